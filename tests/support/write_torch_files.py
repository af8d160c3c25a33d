"""Writes many different files with PyTorch, and beside each what PyTorch itself reads from it.

Run as a program by a Python that has torch: `python write_torch_files.py FOLDER COUNT`. It imports
nothing of this project. Beside N.pt lies N.json, a tree of nodes [kind, ...]; bytes of tensors are
in hexadecimal digits.
"""

import argparse
import collections
import datetime
import json
import pathlib
import pickle
import random
import sys
from typing import Any
from unittest import mock

import torch  # pyright: ignore[reportMissingImports]: of another Python

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
]
# Types with a storage class of their own. The others' bytes torch.load does not swap, and in the
# format before 1.6 it does not read them at all.
TYPED = DTYPES[:4] + DTYPES[8:14]
RANDOM_STATES = {"python": random.Random(0).getstate(), "torch": torch.Generator().get_state()}
ALLOWED = [argparse.Namespace, collections.defaultdict, datetime.timedelta, dict, int, frozenset]
ALLOWED += [list, pathlib.PosixPath, pathlib.PurePosixPath, torch.torch_version.TorchVersion]


class Maker:
    """Makes random contents of checkpoints."""

    def __init__(self, seed: int, dtypes: list):
        self.random, self.dtypes = random.Random(seed), dtypes
        self.generator = torch.Generator().manual_seed(seed)
        self.made: list[torch.Tensor] = []

    def tensor(self) -> torch.Tensor:
        """A dense tensor of any type: new, tied to another, or a view of one."""
        if self.made and self.random.random() < 0.3:
            return self.view(self.random.choice(self.made))
        shape = [self.random.randint(0, 4) for _ in range(self.random.randint(0, 4))]
        if self.random.random() < 0.7:
            shape = [max(1, size) for size in shape]
        dtype = self.random.choice(self.dtypes)
        count = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.randint(
            0, 2 if dtype == torch.bool else 256, (count,), generator=self.generator
        )
        made = bits.to(torch.uint8).view(dtype).reshape(shape)
        self.made.append(made)
        return self.view(made) if self.random.random() < 0.4 else made

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        """The same tensor, or a view of it with other strides and another offset."""
        kind = self.random.choice(["same", "turned", "row", "cut", "steps", "wider", "strided"])
        if kind == "turned" and whole.dim():
            return whole.permute(*self.random.sample(range(whole.dim()), whole.dim()))
        if kind == "row" and whole.dim() and len(whole):
            return whole[self.random.randrange(len(whole))]
        if kind == "cut" and whole.dim():
            return whole[len(whole) // 2 :]
        if kind == "steps" and whole.dim():
            return whole[..., ::2]
        if kind == "wider":
            return whole.expand(self.random.randint(1, 3), *whole.shape)
        if kind == "strided" and whole.numel() > 2 and whole.is_contiguous():
            return torch.as_strided(whole, (2, whole.numel() - 1), (1, 1), whole.storage_offset())
        return whole

    def odd_tensor(self):
        """A kind of tensor that is not read, or not plain."""
        some = torch.randn(2, 3, generator=self.generator)
        return self.random.choice(
            [
                torch.nn.Parameter(some),
                torch.nn.Parameter(some.clone(), requires_grad=False),
                torch.nn.Buffer(some),
                some.clone().requires_grad_(),
                some.to(torch.complex64),
                some.to(torch.complex64).conj(),
                torch.eye(3).to_sparse(),
                torch.eye(3).to_sparse_csr(),
                torch.zeros(2, device="meta"),
            ]
        )

    def value(self, depth: int = 0):
        """A value of any kind, containers of others too."""
        roll = self.random.random()
        if roll < 0.45:
            return self.tensor()
        if roll < 0.5:
            return self.odd_tensor()
        if roll < 0.75 or depth > 3:
            return self.random.choice(
                [
                    *(None, True, False, 0, -1, 255, 65536, -(2**31), 2**31, 2**70, -(2**63)),
                    *(0.1, float("inf"), float("nan"), -0.0, "", "a.b", "ä\n\U0001f600", "x" * 300),
                    *(b"", b"\xff\x00", bytearray(b"12"), 1 + 2j, {1, 2}, frozenset([1])),
                    *(torch.float32, torch.device("cpu"), torch.Size([1, 2]), (1, (2, "b"))),
                    torch.torch_version.TorchVersion("2.1.0"),
                    argparse.Namespace(lr=0.1),
                    datetime.timedelta(seconds=2),
                    pathlib.PurePosixPath("a/b"),
                ]
            )
        size = self.random.randint(0, 4)
        if roll < 0.85:
            values = [self.value(depth + 1) for _ in range(size)]
            return self.random.choice([list, tuple])(values)
        pairs = [(self.key(i), self.value(depth + 1)) for i in range(size)]
        kind = self.random.choice(["dict", "OrderedDict", "defaultdict", "shared"])
        if kind == "OrderedDict":
            return collections.OrderedDict(pairs)
        if kind == "defaultdict":
            return collections.defaultdict(list, pairs)
        inner = dict(pairs)
        return {"a": inner, "b": inner} if kind == "shared" else inner

    def key(self, i: int):
        """A key of a dict."""
        named = ["blocks.{}.weight", "module.{}", "ä{}", "{}"]
        return self.random.choice([*(name.format(i) for name in named), i, i + 0.5, (i, "b"), None])

    def training(self) -> dict:
        """What a training program saves."""
        network = torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), torch.nn.GELU()
        )
        network[2].weight = torch.nn.Parameter(torch.randn(4, 4, generator=self.generator).T)
        kind = self.random.choice([torch.optim.AdamW, torch.optim.SGD])
        optimizer = kind(network.parameters(), lr=0.1)
        network(torch.randn(5, 3, generator=self.generator)).sum().backward()
        optimizer.step()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        dtype = self.random.choice([torch.float32, torch.bfloat16, torch.float16])
        state = {
            "model": network.to(dtype).state_dict(),
            "optimizers": {kind.__qualname__: optimizer.state_dict()},
            "schedulers": scheduler.state_dict(),
            "metadata": {"torch_version": torch.torch_version.TorchVersion(torch.__version__)},
        }
        return {"state": state, "rng": [RANDOM_STATES], "args": argparse.Namespace(lr=0.1)}


def node(value, storages: dict):
    """The tree of what torch.load gave."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_complex():
            return ["other", "tensor"]
        place = storages.setdefault(value.untyped_storage().data_ptr(), len(storages))
        dense = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        raw = dense.view(torch.uint8).numpy().tobytes()
        name = str(value.dtype).removeprefix("torch.")
        where = [place, value.storage_offset() * value.element_size()]
        return ["tensor", name, list(value.shape), list(value.stride()), where, raw.hex()]
    if type(value) in (dict, collections.OrderedDict, collections.defaultdict):
        pairs = [(k, v) for k, v in value.items() if not isinstance(k, tuple)]
        return ["dict", [[node(k, storages), node(v, storages)] for k, v in pairs]]
    if type(value) in (list, tuple, torch.Size):
        name = "list" if type(value) is list else "tuple"
        return [name, [node(item, storages) for item in value]]
    if type(value) is float:
        return ["float", value.hex()]
    if type(value) is bytes:
        return ["bytes", value.hex()]
    if type(value) in (int, bool, str) or value is None:
        return [type(value).__name__, value]
    return ["other", type(value).__qualname__]


def main(folder: pathlib.Path, count: int) -> None:
    """Writes files until `count` of them are such that the restricted loader reads them."""
    torch.serialization.add_safe_globals(ALLOWED)
    i = restricted = 0
    while restricted < count:
        i += 1
        rng = random.Random(i)
        big = rng.random() < 0.1
        is_zip = rng.random() > 0.25
        maker = Maker(i, DTYPES if is_zip and not big else TYPED)
        contents = maker.training() if rng.random() < 0.15 else {"w": maker.tensor()}
        contents |= {f"v{n}": maker.value() for n in range(rng.randint(0, 6))}
        torch.serialization.set_crc32_options(rng.random() > 0.1)
        options: dict[str, Any] = {"_use_new_zipfile_serialization": is_zip}
        if is_zip and rng.random() < 0.1:
            options["pickle_protocol"] = rng.choice([3, 4, 5])
        path = folder / f"{i}.pt"
        with mock.patch.object(sys, "byteorder", "big" if big else "little"):
            try:
                torch.save(contents, path, **options)
            except (RuntimeError, NotImplementedError, KeyError, TypeError, AttributeError):
                path.unlink(missing_ok=True)  # a kind that this format cannot hold
                continue
        try:
            found = torch.load(path, weights_only=True)
            restricted += 1
        except pickle.UnpicklingError:  # protocols 3 to 5, a full defaultdict
            found = torch.load(path, weights_only=False)
        except RuntimeError as error:  # torch 2.14 itself, of a big-endian file
            assert big and "col_indices" in str(error), error
            path.unlink()
            continue
        (folder / f"{i}.json").write_text(json.dumps(node(found, {})))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
