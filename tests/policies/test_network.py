"""The embedded network: shapes, its start at zero, and what depends on what."""

import pytest
import torch
from torch.nn import functional as F

from entroflow.policies import attention as attention_module
from entroflow.policies.shapes import network as network_module
from entroflow.policies.shapes.network import (
    ShapesNetwork,
    sigma_features,
    sincos_positions,
)
from entroflow.policies.shapes.tokenizer import CAPTION_LENGTH, VOCABULARY, tokenize


def randomised(seed=0, **sizes):
    """A network with no weight at zero, so that everything can have an influence."""
    network = ShapesNetwork(VOCABULARY, CAPTION_LENGTH, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.3 / max(parameter[0].numel(), 1) ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def network():
    return randomised().requires_grad_(False)


def inputs(batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    sigma = torch.rand(batch, generator=generator)
    words = torch.randint(VOCABULARY, (batch, CAPTION_LENGTH), generator=generator)
    return x, sigma, words


@pytest.mark.parametrize("batch", [1, 3])
def test_a_velocity_has_the_shape_of_the_state(network, batch):
    velocity = network(*inputs(batch))
    assert velocity.shape == (batch, 3, 32, 32)
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()


def test_the_network_starts_at_zero():
    """The last layer is zero, and every block leaves its tokens as they are (AdaLN-zero)."""
    torch.manual_seed(0)
    network = ShapesNetwork(VOCABULARY, CAPTION_LENGTH)
    assert torch.equal(network(*inputs(2)), torch.zeros(2, 3, 32, 32))
    text, image = torch.randn(2, CAPTION_LENGTH, 128), torch.randn(2, 64, 128)
    for block in network.blocks:
        after = block(text, image, torch.randn(2, 128))
        assert torch.equal(after[0], text)
        assert torch.equal(after[1], image)


def test_the_network_is_small():
    network = ShapesNetwork(VOCABULARY, CAPTION_LENGTH)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert 1.8e6 < count < 3e6
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_rows_of_a_batch_do_not_influence_each_other(network):
    """Bit for bit when another row changes; to rounding when the row is alone or moved."""
    x, sigma, words = inputs(4)
    velocity = network(x, sigma, words)
    other = inputs(4, seed=2)
    for row in range(4):
        mixed = [theirs.clone() for theirs in other]
        for part, mine in zip(mixed, (x, sigma, words), strict=True):
            part[row] = mine[row]
        assert torch.equal(network(*mixed)[row], velocity[row])
        alone = network(x[row : row + 1], sigma[row : row + 1], words[row : row + 1])
        torch.testing.assert_close(alone[0], velocity[row], atol=1e-5, rtol=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        network(x[order], sigma[order], words[order]), velocity[order], atol=1e-5, rtol=1e-4
    )


def test_every_word_changes_the_output(network):
    """At one place of the caption, all words of the vocabulary give different velocities."""
    x, sigma, words = (part.expand(VOCABULARY, *part.shape[1:]) for part in inputs(1))
    words = words.clone()
    words[:, 1] = torch.arange(VOCABULARY)
    velocity = network(x, sigma, words).flatten(1).double()
    assert torch.pdist(velocity).min() > 1e-4


def test_every_place_of_the_caption_matters(network):
    x, sigma, words = (part.expand(CAPTION_LENGTH + 1, *part.shape[1:]) for part in inputs(1))
    words = words.clone()
    for place in range(CAPTION_LENGTH):
        words[place + 1, place] = (words[0, place] + 1) % VOCABULARY
    velocity = network(x, sigma, words)
    assert (velocity[1:] - velocity[:1]).flatten(1).norm(dim=1).min() > 1e-3


def test_the_order_of_words_matters(network):
    x, sigma, _ = inputs(1)
    one, two = (
        network(x, sigma, tokenize([caption]))
        for caption in ("a ring left of a cross", "a cross left of a ring")
    )
    assert (one - two).norm() > 1e-3


def test_sigma_and_the_state_matter(network):
    x, sigma, words = inputs(1)
    velocity = network(x, sigma, words)
    assert (network(x, sigma + 0.05, words) - velocity).norm() > 1e-3
    x[0, 1, 20, 7] += 1
    assert (network(x, sigma, words) - velocity).norm() > 1e-3


def test_every_parameter_gets_a_gradient():
    network = randomised(width=32, depth=2)
    x, sigma, words = inputs(40)
    words[:VOCABULARY, 0] = torch.arange(VOCABULARY)
    network(x, sigma, words).square().sum().backward()
    for name, parameter in network.named_parameters():
        # What the text stream makes of the last attention is read by nobody.
        unread = name.startswith("blocks.1.text.") and name.split(".")[3] in (
            "scale_q",
            "out",
            "widen",
            "narrow",
        )
        if not unread:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_all_attention_goes_through_one_function(network, monkeypatch):
    """One call per block, in order, over text and image tokens together."""
    calls = []

    def counted(q, k, v, layer, text):
        assert text == CAPTION_LENGTH
        calls.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return attention_module.attention(q, k, v, layer, text)

    def refused(*_, **__):
        raise AssertionError("attention outside the one function")

    velocity = network(*inputs(2))
    monkeypatch.setattr(network_module, "attention", counted)
    monkeypatch.setattr(F, "scaled_dot_product_attention", refused)
    assert torch.equal(network(*inputs(2)), velocity)
    both, image = (2, 4, CAPTION_LENGTH + 64, 32), (2, 4, 64, 32)
    # In the last block nobody reads what becomes of the text, so it does not ask.
    assert calls == [(layer, image if layer == 3 else both, both, both) for layer in range(4)]


def test_without_attention_pixels_stay_apart(network, monkeypatch):
    """Far pixels reach a pixel through attention only."""

    def reach():
        x = inputs(1)[0].requires_grad_()
        words = tokenize(["a ring left of a cross"])
        corner = network(x, torch.tensor([0.5]), words)[0, :, -1, -1].sum()
        return torch.autograd.grad(corner, x)[0][0, :, 0, 0].abs().sum().item()

    assert reach() > 0
    monkeypatch.setattr(network_module, "attention", lambda q, *_, **__: torch.zeros_like(q))
    assert reach() == 0


def test_a_word_sees_four_words_on_either_side(network):
    """As far as from the second shape to the relation in "a red circle left of a blue square"."""
    words = tokenize(["a red circle left of a blue square"])
    embedded = network.words(words).requires_grad_()
    seen = network.neighbours(embedded.mT).mT
    assert seen.shape == embedded.shape
    gradient = torch.autograd.grad(seen[0, 4].sum(), embedded)[0][0].abs().sum(dim=1)
    assert (gradient > 0).tolist() == [abs(place - 4) <= 4 for place in range(CAPTION_LENGTH)]


def test_attention_is_softmax_attention():
    """Against the fused kernel and, for one query, the sum written out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 16, generator=generator).unbind(0)
    result = attention_module.attention(q, k, v, layer=0, text=2)
    torch.testing.assert_close(
        result, F.scaled_dot_product_attention(q, k, v), atol=1e-6, rtol=1e-5
    )
    weight = torch.exp((k[1, 2] @ q[1, 2, 3]) / 4)
    one = (weight[:, None] * v[1, 2]).sum(dim=0) / weight.sum()
    torch.testing.assert_close(result[1, 2, 3], one, atol=1e-6, rtol=1e-5)


def test_positions_are_distinct_bounded_and_not_saved():
    positions = sincos_positions(8, 128)
    assert positions.shape == (64, 128)
    assert positions.abs().max() <= 1
    distance = torch.cdist(positions, positions)
    distance.fill_diagonal_(torch.inf)
    assert distance.min() > 0.5
    # Row and column in one half each: tokens of a row share the first half.
    grid = positions.view(8, 8, 128)
    assert torch.equal(grid[3, 1, :64], grid[3, 6, :64])
    assert torch.equal(grid[1, 3, 64:], grid[6, 3, 64:])
    assert "positions" not in ShapesNetwork(VOCABULARY, CAPTION_LENGTH).state_dict()


def test_sigma_features_tell_close_sigmas_apart():
    """256 levels between 0 and 1 are all different, and the norm is the same for all."""
    features = sigma_features(torch.linspace(0, 1, 256), 128)
    assert features.shape == (256, 128)
    torch.testing.assert_close(features.square().sum(dim=1), torch.full((256,), 64.0))
    distance = torch.cdist(features, features)
    distance.fill_diagonal_(torch.inf)
    assert distance.min() > 0.1


def test_the_image_stream_is_convolutional_at_the_seams(network):
    """A pixel next to a patch border reaches the stem tokens of both patches."""
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    tokens = network.stem(F.silu(network.fine(x)))
    assert tokens.shape == (1, 128, 8, 8)
    reached = [
        torch.autograd.grad(tokens[0, :, 4, column].sum(), x, retain_graph=True)[0][0, :, 17, 16]
        for column in (3, 4)
    ]
    assert all(gradient.abs().sum() > 0 for gradient in reached)


def test_a_network_saved_and_loaded_is_the_same(network):
    other = ShapesNetwork(VOCABULARY, CAPTION_LENGTH)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(*inputs(2)), network(*inputs(2)))
