"""Text embeddings on disk, addressed by all that they are computed from.

    address = content of the text encoders and tokenizers, settings, versions, prompt

So a model that is replaced under the same name has other addresses, and the same encoders in
another folder the same ones. Several processes may share the folder: a file appears whole or not at
all, whoever writes it writes the same, and one that is damaged is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from entroflow.errors import InputError
from entroflow.writing import write_bytes

log = logging.getLogger(__name__)

LIBRARIES = ("diffusers", "transformers", "tokenizers")
"""They turn a prompt into embeddings; other versions may do it otherwise."""
UNRELATED = (
    "_name_or_path", "name_or_path", "is_local", "local_files_only", "transformers_version",
    "padding", "truncation",
)  # fmt: skip
"""Of configurations, what changes no embedding: where they were read from, what wrote them, and how
the last call padded and cut."""


class EmbeddingCache:
    """The embeddings of one model and its settings in a folder."""

    def __init__(self, folder: Path, origin: str) -> None:
        """`origin` stands for all that the embeddings of a prompt depend on.

        Raises:
            InputError: the folder can't be made.
        """
        self.folder, self.origin = folder, origin
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"policy.cache: {folder} can't be made ({error.strerror}).") from None

    def read(self, text: str) -> dict[str, Tensor] | None:
        """The embeddings of a prompt by name; None where they are not there, or damaged."""
        path = self._path(text)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                written = (opened.metadata() or {}).get("digest")
        except (SafetensorError, OSError) as error:
            written, problem = None, str(error)
        else:
            problem = "its values are not those that were written"
            if written == digest_of(tensors.items()):
                return tensors
        log.warning("%s is damaged (%s), so its prompt is encoded again.", path, problem)
        return None

    def write(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the embeddings of a prompt."""
        metadata = {"digest": digest_of(tensors.items())}
        write_bytes(self._path(text), save(dict(tensors), metadata=metadata))

    def _path(self, text: str) -> Path:
        address = hashlib.blake2b(f"{self.origin}\n{text}".encode(), digest_size=16)
        return self.folder / f"{address.hexdigest()}.safetensors"


def origin_of(pipeline: Any, *settings: object) -> str:
    """A digest of everything that a pipeline's text embeddings depend on.

    It reads every byte of the encoders once, about 1 GB a second: some 10 s for T5-XXL.

    Args:
        settings: of the encoding.
    """
    whole = hashlib.blake2b(digest_size=16)
    whole.update(repr([type(pipeline).__name__, *settings]).encode())
    whole.update(repr([version(library) for library in LIBRARIES]).encode())
    for name, part in sorted(pipeline.components.items()):
        if name.startswith(("text_encoder", "tokenizer")):
            whole.update(name.encode())
            content = _encoder(part) if isinstance(part, torch.nn.Module) else _tokenizer(part)
            whole.update(content.encode())
    return whole.hexdigest()


def _encoder(encoder: Any) -> str:
    return digest_of(encoder.state_dict().items()) + _plain(encoder.config.to_dict())


def _tokenizer(tokenizer: Any) -> str:
    """All that a tokenizer saves."""
    if tokenizer is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        contents = []
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.suffix == ".json":
                content = _plain(json.loads(content)).encode()
            contents.append(f"{file.name} {hashlib.blake2b(content).hexdigest()}")
    return "\n".join(contents)


def _plain(content: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key not in UNRELATED}
    return json.dumps(kept, sort_keys=True, default=str)


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, types, shapes and all values."""
    whole = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        whole.update(values.numpy().data)
    return whole.hexdigest()
