"""The shapes world: 32x32 scenes of coloured shapes, their captions, and a scorer."""
