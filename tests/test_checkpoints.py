"""Checkpoints: whole or not at all, readable without pickle, and refused when torn."""

import contextlib
import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch

from entroflow import checkpoints, writing
from entroflow.checkpoints import (
    CheckpointError,
    load_optimizer_tensors,
    optimizer_tensors,
    read_state,
    read_tensors,
    write_checkpoint,
)
from entroflow.writing import (
    to_json,
    write_bytes,
    write_text,
)


def parts(value):
    return {"one": {"w": torch.full((2, 3), value)}, "two": {"v": torch.arange(4) + int(value)}}


def assert_holds(folder, value):
    """The folder is the whole checkpoint of `parts(value)`."""
    assert read_state(folder) == {"value": value}
    for name, tensors in parts(value).items():
        found = read_tensors(folder / f"{name}.safetensors")
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[key], tensor)
            assert found[key].dtype == tensor.dtype


def write(folder, value):
    write_checkpoint(folder, parts(value), {"value": value})


def test_a_checkpoint_reads_back_and_holds_nothing_else(tmp_path):
    folder = tmp_path / "deep" / "run"
    write(folder, 1.0)
    assert_holds(folder, 1.0)
    assert sorted(p.name for p in folder.iterdir()) == [
        "digests.json",
        "one.safetensors",
        "state.json",
        "two.safetensors",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    """Files of the old one that the new one lacks are gone."""
    folder = tmp_path / "run"
    write_checkpoint(folder, {**parts(1.0), "more": {"x": torch.zeros(1)}}, {"value": 1.0})
    write(folder, 2.0)
    assert_holds(folder, 2.0)
    assert not (folder / "more.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_tensors_keep_type_and_bits(tmp_path, dtype):
    """Also scalars, empty tensors, views that are not contiguous, and tensors with a gradient."""
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3
    tensors = {
        "matrix": base.to(dtype, copy=True),
        "turned": base.to(dtype, copy=True).T,
        "scalar": base[0, 0].to(dtype, copy=True),
        "empty": base[:0].to(dtype, copy=True),
    }
    if dtype.is_floating_point:
        tensors["leaf"] = base.to(dtype, copy=True).requires_grad_()
    write_checkpoint(tmp_path / "run", {"all": tensors}, {})
    found = read_tensors(tmp_path / "run" / "all.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


def test_files_are_safetensors_and_json_not_pickle(tmp_path):
    """Read by hand: eight bytes of length, a JSON header, then the raw numbers."""
    write(tmp_path / "run", 1.5)
    raw = (tmp_path / "run" / "one.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    start, end = header["w"]["data_offsets"]
    body = raw[8 + length :]
    assert header["w"]["dtype"] == "F32"
    assert struct.unpack("<6f", body[start:end]) == (1.5,) * 6
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"value": 1.5}
    for path in (tmp_path / "run").iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


class CrashError(Exception):
    """The machine stops here."""


@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_while_tensors_are_written_keeps_the_old_checkpoint(tmp_path, monkeypatch, at):
    """At the first or the second file; the next write succeeds and leaves nothing behind."""
    folder = tmp_path / "run"
    write(folder, 1.0)
    save, calls = checkpoints.save_file, []

    def crash(tensors, path):
        calls.append(path)
        if len(calls) == at:
            Path(path).write_bytes(b"half")
            raise CrashError
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", crash)
        with pytest.raises(CrashError):
            write(folder, 2.0)
    assert_holds(folder, 1.0)
    write(folder, 3.0)
    assert_holds(folder, 3.0)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_crash_of_the_first_write_leaves_no_folder(tmp_path, monkeypatch):
    def crash(*_):
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", crash)
        with pytest.raises(CrashError):
            write(tmp_path / "run", 1.0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no state\.json"):
        read_state(tmp_path / "run")


def test_a_state_that_is_no_json_keeps_the_old_checkpoint(tmp_path):
    folder = tmp_path / "run"
    write(folder, 1.0)
    with pytest.raises(TypeError):
        write_checkpoint(folder, parts(2.0), {"value": object()})
    assert_holds(folder, 1.0)


def test_a_crash_between_the_renames_leaves_a_checkpoint(tmp_path, monkeypatch):
    """Old or new, a reader finds one of them at every moment."""
    folder = tmp_path / "run"
    write(folder, 1.0)
    rename, calls = Path.replace, []

    def crash(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise CrashError
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with contextlib.suppress(CrashError):
            write(folder, 2.0)
    assert read_state(folder)["value"] in (1.0, 2.0)


def test_a_crash_while_the_old_checkpoint_is_removed_does_not_stop_the_next(tmp_path, monkeypatch):
    """The next run may have the same process number, as the first process of a container has."""
    folder = tmp_path / "run"
    write(folder, 1.0)

    def crash(path, ignore_errors=False):
        if Path(path).exists():
            raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", crash)
        with pytest.raises(CrashError):
            write(folder, 2.0)
    assert_holds(folder, 2.0)
    write(folder, 3.0)
    assert_holds(folder, 3.0)


# --- torn files -----------------------------------------------------------------------------------


def test_tensors_torn_anywhere_are_refused(tmp_path):
    """Cut after every byte of the header and at some places of the numbers."""
    write(tmp_path / "run", 1.0)
    path = tmp_path / "run" / "one.safetensors"
    whole = path.read_bytes()
    for left in range(len(whole)):
        path.write_bytes(whole[:left])
        with pytest.raises(CheckpointError, match=r"one\.safetensors is torn"):
            read_tensors(path)


def test_a_header_overwritten_with_noise_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(CheckpointError, match="is torn"):
        read_tensors(path)


def test_missing_tensors_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors is missing"):
        read_tensors(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b'{"value": 1.', b"\xff\xfe\x00", b"step 3"])
def test_a_torn_state_is_refused(tmp_path, content):
    write(tmp_path / "run", 1.0)
    (tmp_path / "run" / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json is torn.*remove its folder"):
        read_state(tmp_path / "run")


def test_a_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)


# --- text -----------------------------------------------------------------------------------------


def test_text_is_written_and_replaced_with_its_folder(tmp_path):
    path = tmp_path / "deep" / "note.txt"
    for content in ("σ = ½\n", "", "later"):
        write_text(path, content)
        assert path.read_text(encoding="utf-8") == content
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_bytes_are_written_as_they_are(tmp_path):
    content = bytes(range(256)) + b"\r\n"
    write_bytes(tmp_path / "deep" / "raw", content)
    assert (tmp_path / "deep" / "raw").read_bytes() == content


def test_a_crash_while_text_is_written_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def crash(_):
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", crash)
        with pytest.raises(CrashError):
            write_text(path, "new")
    assert path.read_text() == "old"


# --- optimizers -----------------------------------------------------------------------------------


def model(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))


def train(network, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 5, generator=generator)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_goes_on_bit_equal_after_a_round_trip(tmp_path, amsgrad):
    """Ten steps in one go, and five before and five after writing and reading everything."""

    def adamw(network):
        return torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1, amsgrad=amsgrad)

    network = model(0)
    optimizer = adamw(network)
    train(network, optimizer, 5, seed=1)
    write_checkpoint(
        tmp_path / "run",
        {"network": network.state_dict(), "optimizer": optimizer_tensors(optimizer)},
        {},
    )
    train(network, optimizer, 5, seed=2)

    other = model(9)
    resumed = adamw(other)
    other.load_state_dict(read_tensors(tmp_path / "run" / "network.safetensors"))
    load_optimizer_tensors(resumed, read_tensors(tmp_path / "run" / "optimizer.safetensors"))
    train(other, resumed, 5, seed=2)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    before, after = optimizer_tensors(optimizer), optimizer_tensors(resumed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_optimizer_tensors_are_keyed_by_parameter_and_name():
    network = model(0)
    optimizer = torch.optim.AdamW(network.parameters())
    assert optimizer_tensors(optimizer) == {}
    train(network, optimizer, 3, seed=0)
    tensors = optimizer_tensors(optimizer)
    assert set(tensors) == {
        f"{index}.{name}" for index in range(4) for name in ("step", "exp_avg", "exp_avg_sq")
    }
    assert {tensors[f"{index}.step"].item() for index in range(4)} == {3.0}
    assert tensors["2.exp_avg"].shape == network[2].weight.shape


def test_loading_keeps_the_present_learning_rate():
    network = model(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    train(network, optimizer, 2, seed=0)
    resumed = torch.optim.AdamW(model(0).parameters(), lr=0.5, weight_decay=0.3)
    load_optimizer_tensors(resumed, optimizer_tensors(optimizer))
    assert resumed.param_groups[0]["lr"] == 0.5
    assert resumed.param_groups[0]["weight_decay"] == 0.3


def test_an_optimizer_over_groups_keeps_its_order():
    """Indices run through the groups, whatever their settings."""
    network = model(0)

    def grouped(net):
        return torch.optim.AdamW(
            [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.2}]
        )

    optimizer = grouped(network)
    train(network, optimizer, 2, seed=0)
    other = model(0)
    resumed = grouped(other)
    load_optimizer_tensors(resumed, optimizer_tensors(optimizer))
    last = resumed.state[other[2].bias]["exp_avg"]
    assert torch.equal(last, optimizer.state[network[2].bias]["exp_avg"])


def test_what_is_not_finite_is_null_in_json():
    """At any depth; Python's own NaN is no JSON, and other readers refuse it."""
    content = {"a": math.nan, "b": [1.5, {"c": -math.inf}], "d": "NaN", "e": None, "f": 3}
    text = to_json(content)
    known = json.loads(text, parse_constant=pytest.fail)
    assert known == {"a": None, "b": [1.5, {"c": None}], "d": "NaN", "e": None, "f": 3}


def test_a_state_comes_back_with_what_is_not_finite(tmp_path):
    """A running best that starts at -inf is one."""
    write_checkpoint(tmp_path / "one", {}, {"best": -math.inf, "scale": [math.nan]})
    state = read_state(tmp_path / "one")
    assert state["best"] == -math.inf
    assert math.isnan(state["scale"][0])


def test_files_are_as_readable_as_the_umask_lets_them_be(tmp_path):
    """Weights are for others of the group too; safetensors alone would keep them to the owner."""
    before = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "checkpoint", parts(1), {"value": 1})
        write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    files = [tmp_path / "text", *(tmp_path / "checkpoint").iterdir()]
    assert len(files) == 5
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
