"""Shows the joint attention of diffusers' transformers, which goes through a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from entroflow.errors import InputError
from entroflow.policies.attention import show

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
"""Where a transformer has its blocks, in the order in which they run."""


@contextmanager
def shown_attention(transformer: nn.Module, text: slice) -> Iterator[None]:
    """Show the joint attention of every block inside, layers counted over all of them.

    An image-only attention beside the joint one (`attn2` of SD3.5-medium) is not shown.

    Args:
        transformer: of diffusers.
        text: which keys are text.
    """
    blocks = [block for name in BLOCKS for block in getattr(transformer, name, ())]
    with _Intercepted(text) as seen, ExitStack() as stack:
        for layer, block in enumerate(blocks):
            joint: nn.Module = block.attn
            before = joint.register_forward_pre_hook(seen.enters(layer))
            after = joint.register_forward_hook(seen.enters(None))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


class _Intercepted(TorchFunctionMode):
    """Looks at the arguments of the fused kernel while a joint attention runs."""

    def __init__(self, text: slice) -> None:
        super().__init__()
        self._text = text
        self._layer: int | None = None

    def enters(self, layer: int | None) -> Callable[..., None]:
        """A hook: what follows is the attention of this layer; of None, it has ended."""

        def hook(*_: Any) -> None:
            self._layer = layer

        return hook

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self._layer is not None:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            if named.get("attn_mask") is not None or named.get("scale") is not None:
                raise InputError(
                    f"attention layer {self._layer} has a mask or a scale of its own, which the "
                    "measurement of attention entropy does not know; leave the section attention "
                    "and what needs it out."
                )
            show(self._layer, named["query"], named["key"], self._text)
        return func(*args, **kwargs)
