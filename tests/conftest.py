"""Settings of all tests."""

import os

# Before torch is imported: two OpenMP threads beside another process spin instead of working.
os.environ.setdefault("OMP_NUM_THREADS", "1")
