"""How much memory a run takes on a device, computed from the configuration files of a model alone.

The network is built without values and led through its passes by tensors that have none either
(`FakeTensorMode`), while every storage that appears is counted until it is gone. So the peak of a
pass is what PyTorch would hold at once; what a device's allocator and kernels add is left out.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entroflow.policies.base import Condition, Memory
from entroflow.policies.diffusers.loading import UNREADABLE, no_pipeline

if TYPE_CHECKING:
    from entroflow.policies.diffusers.base import DiffusersConfig, DiffusersPolicy

FLOAT32_ON_CUDA = ("layer_norm", "group_norm", "softmax")
"""What CUDA's autocast computes in float32 and that of the CPU does not."""
KEPT_COPIES = 4
"""Of what is trained, without gradients: AdamW's two moments, moving average, reference."""


def memory_of(
    settings: DiffusersConfig,
    *,
    guidance: float,
    batch_size: int,
    micro_batch: int,
    prompts_at_once: int,
) -> Memory:
    """What a run needs.

    Args:
        guidance: of sampling.
        batch_size: images in one network call.
        micro_batch: states in one forward and backward pass.
        prompts_at_once: in one call of the text encoders.

    Raises:
        InputError: no configuration of a pipeline is found.
    """
    policy = _without_values(settings)
    transformer, vae = policy.pipeline.transformer, policy.pipeline.vae
    trained = _bytes(policy.weights.live.values())
    encoders = sum(_bytes(_tensors(encoder)) for encoder in policy.encoders())
    kept = {
        "transformer": _bytes(_tensors(transformer)),
        "gradients, AdamW, moving average, reference": (1 + KEPT_COPIES) * trained,
        "VAE": _bytes(_tensors(vae)),
    }
    with FakeTensorMode(), _as_on_cuda():
        for module in (transformer, vae, *policy.encoders()):
            _fill(module)
        policy.stay_on("cpu")
        held = [*_tensors(transformer), *_tensors(vae)]
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                held.append(parameter.grad)

        def pass_through(images: int) -> Tensor:
            shapes = policy.embedding_shapes().items()
            cond = {name: torch.empty(images, *shape, dtype=policy.dtype) for name, shape in shapes}
            x = torch.empty(images, *policy.latent_shape)
            return policy.velocity(x, torch.ones(images), Condition(cond), guidance)

        with Appearing(held) as training:
            pass_through(micro_batch).square().mean().backward()
        with Appearing(held) as sampling, torch.no_grad():
            pass_through(batch_size)
        with Appearing(held) as decoding:
            policy.decode(torch.empty(1, *policy.latent_shape))
        encoding = max(_encoding(policy, encoder, prompts_at_once) for encoder in policy.encoders())
    passing = {
        "a training pass": training.most,
        "a sampling pass": sampling.most,
        # The roots of AdamW's second moments, for all weights at once.
        "an optimizer step": trained,
        "decoding an image": decoding.most,
        "encoding prompts": encoding,
    }
    if settings.offload_encoders:
        passing["encoding prompts"] += encoders
    else:
        kept["text encoders"] = encoders
    return Memory(kept, passing)


def _encoding(policy: DiffusersPolicy, encoder: nn.Module, prompts: int) -> int:
    """What one text encoder holds beside its weights while it encodes."""
    config: Any = encoder.config
    tokens = getattr(config, "max_position_embeddings", policy.settings.tokens)
    ids = torch.zeros(prompts, tokens, dtype=torch.long)
    with Appearing(_tensors(encoder)) as seen, torch.no_grad():
        encoder(ids, output_hidden_states=config.model_type != "t5")
    return int(seen.most)


def _without_values(settings: DiffusersConfig) -> DiffusersPolicy:
    """The policy over a pipeline whose modules are on the meta device; it has no tokenizers."""
    place = settings.config or settings.model
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(place)
    except UNREADABLE as error:
        raise no_pipeline(settings, error) from None
    components: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list | tuple):
            continue
        library, kind = entry
        chosen = None if library is None else getattr(importlib.import_module(library), kind)
        components[name] = None if chosen is None else _hollow(settings, place, name, chosen)
    chosen = getattr(importlib.import_module("diffusers"), index["_class_name"])
    without = {
        "device": "meta", "reference": "start", "compile": False, "offload_encoders": False,
        "cache": None,
    }  # fmt: skip
    return settings.model_copy(update=without).over(chosen(**components))


def _hollow(settings: DiffusersConfig, place: str, name: str, chosen: Any) -> Any:
    if name == "scheduler":
        return chosen.from_pretrained(place, subfolder=name)
    if not issubclass(chosen, nn.Module):
        return None
    with torch.device("meta"):
        if hasattr(chosen, "config_class"):
            made = chosen(chosen.config_class.from_pretrained(place, subfolder=name))
        else:
            made = chosen.from_config(chosen.load_config(place, subfolder=name))
    # Not the module's own `to`, which warns of what concerns values.
    return nn.Module.to(made, settings.dtype_of(name))


def _fill(module: nn.Module) -> None:
    """Give a module on the meta device tensors of the active fake mode, on the CPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Within, norms have their input in float32 under autocast, as on CUDA; so has what follows.

    The functions themselves are replaced for the time, as a pass that is computed again in the
    backward pass knows no mode of the forward pass.
    """

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
            return function(*args, **kwargs)

        return called

    before = {name: getattr(nn.functional, name) for name in FLOAT32_ON_CUDA}
    for name, function in before.items():
        setattr(nn.functional, name, in_float32(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(nn.functional, name, function)


class Appearing(TorchDispatchMode):
    """Counts the bytes of tensors that operations give out, for as long as their storage lives.

    Attributes:
        most: the largest sum so far.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        """`held` are there already, and not counted."""
        super().__init__()
        self.most = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what is new."""
        given = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return given

    def _count(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size
