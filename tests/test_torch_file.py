"""Files of torch.save: plain tensors come out as they are, and nothing that a file asks for is run."""

import collections
import os
import warnings
import zipfile

import numpy as np
import pytest

from ddpo_jax.errors import UserError
from ddpo_jax.models.torch_file import read_torch_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def tensors():
    torch.manual_seed(0)
    found = {f"of {dtype}": (3 * torch.randn(3, 4)).abs().to(dtype) for dtype in DTYPES}
    shared = torch.arange(24.0).reshape(2, 3, 4)
    return found | {
        "transposed": shared.transpose(0, 2),
        "a part": shared[:, 1:, ::2],
        "a number": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "a parameter": torch.nn.Parameter(shared[0].clone()),
    }


@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict, lambda x: {"epoch": 3, "state_dict": x}])
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_tensors_come_out_as_they_are(tmp_path, wrap, protocol):
    expected = tensors()
    torch.save(wrap(expected), tmp_path / "file.pth", pickle_protocol=protocol)
    found = read_torch_tensors(tmp_path / "file.pth")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape)
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype(np.float64), tensor.detach().to(torch.float64).numpy())


def test_a_modules_state_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "file.pth")
    found = read_torch_tensors(tmp_path / "file.pth")
    assert {name: array.shape for name, array in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in module.state_dict().items()
    }


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_nothing_is_run(tmp_path):
    proof = tmp_path / "proof"
    for i, evil in enumerate([Evil(os.mkdir, (str(proof),)), Evil(eval, (f"__import__('os').mkdir({str(proof)!r})",))]):
        for content in ({"weight": torch.ones(2), "more": evil}, evil, {"weight": [evil]}):
            path = tmp_path / f"{i}.pth"
            torch.save(content, path)
            with pytest.raises(UserError, match=r"it asks for .*(mkdir|eval) to be called.*nothing in a file is run"):
                read_torch_tensors(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "content",
    [{}, [torch.ones(2)], {"weight": 3.0}, {3: torch.ones(2)}, {"module": torch.nn.Linear(2, 2)}, "text"],
    ids=lambda content: str(content)[:12],
)
def test_what_is_no_dict_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"file\.pth: .*Only plain tensors are read"):
        read_torch_tensors(tmp_path / "file.pth")


def test_broken_files_are_one_line(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"weight": torch.ones(100)}, path)
    whole = path.read_bytes()
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    for content in (whole[:300], old, b"", b"\x80\x02not a program."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"file\.pth: not a file of torch\.save"):
            read_torch_tensors(path)
    with pytest.raises(UserError, match=r"none\.pth: cannot be read"):
        read_torch_tensors(tmp_path / "none.pth")


@pytest.mark.parametrize("program", [b"\x80\x02}q\x00", b"\x80\x02cos\nsystem\n.", b"garbage", b"\x80\x02(t.", b"."])
def test_broken_programs_are_one_line(tmp_path, program):
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(UserError, match=r"file\.pth: "):
        read_torch_tensors(tmp_path / "file.pth")


MALFORMED = {
    "offset": lambda fields: fields.update(offset="a"),
    "no shape": lambda fields: fields.update(shape=None),
    "fewer strides": lambda fields: fields.update(strides=(1,)),
    "empty and huge": lambda fields: fields.update(shape=(0, 2**70)),
    "a huge stride": lambda fields: fields.update(strides=(2**70, 1)),
    "too many numbers": lambda fields: fields.update(shape=(2**40, 2**40), strides=(0, 0)),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_tensors_are_one_line(tmp_path, change):
    fields = {"offset": 0, "shape": (2, 3), "strides": (3, 1)}
    change(fields)
    numbers = torch.zeros(6)

    class Odd:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (numbers.storage(), *fields.values(), False, {})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"weight": Odd()}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"file\.pth: ") as raised:
        read_torch_tensors(tmp_path / "file.pth")
    assert "\n" not in str(raised.value)


def test_changed_bytes_and_compressed_parts_are_one_line(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({f"weight {i}": torch.ones(20) for i in range(3)}, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(whole)
        for i in rng.integers(len(whole), size=3):
            changed[i] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            read_torch_tensors(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small:
        for name in archive.namelist():
            small.writestr(name, archive.read(name))
    with pytest.raises(UserError, match=r"small\.pth: a part of it is compressed"):
        read_torch_tensors(tmp_path / "small.pth")
