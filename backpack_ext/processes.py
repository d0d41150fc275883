"""Sums of stores over the processes of a group.

What happens at the end of each backward pass:

1. *agreement*: one small message, in which each process has a row: which pass it is in, the number of
   terms of its loss, a digest of what it has to add;
2. where digests differ (a process skipped a module), descriptions are exchanged, and who lacks
   something adds zeros; what came out is remembered;
3. *sums*: few flat messages per data type, however many tensors there are.

All messages are sums over the group, of tensors that live where the group's backend wants them. Each
has a time limit.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from hashlib import sha256

import torch
from torch import Tensor
from torch import distributed as dist

from backpack_ext.errors import ProcessGroupError, RecordingError, UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.loss_scale import LossScale
from backpack_ext.names import Names
from backpack_ext.share import Outline, Part, Share

# Bytes of one message: large enough for the bandwidth, small enough to be sent while the next is packed.
BUCKET = 2**25

# What each process has to add, in order.
Outlines = tuple[Outline, ...]

# How many blocks were entered with a group: who is ahead of others has missed a failure.
_blocks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

# What the processes of a group agreed on, by their digests. All of them have the same exchanges behind
# them, and forget at the same time.
_agreed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
REMEMBERED = 256


class Processes:
    """The processes that results are summed over.

    Args:
        group: Their process group.
        timeout: Seconds after which a message that others do not answer is given up.

    Attributes:
        sent: Bytes of all messages so far.

    Raises:
        TypeError: If ``group`` is no process group.
        ValueError: If this process is not in it, or ``timeout`` is not positive.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float):
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                f"process_group={group!r}: expected a torch.distributed process group this process "
                "belongs to; torch.distributed.group.WORLD has all processes."
            )
        if not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
            raise ValueError(f"timeout={timeout!r}: expected a positive number of seconds.")
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = _device(group)
        self.passes = self.sent = 0

    def enter(self) -> None:
        """Note that a block is entered."""
        _blocks[self.group] = _blocks.get(self.group, 0) + 1
        self.passes = 0

    def combine(self, stores: Mapping[Extension, dict], scale: LossScale) -> dict[Extension, dict]:
        """Return the stores that one process would have that sees the data of all.

        Args:
            stores: What each extension has accumulated here.
            scale: That of the losses here.

        Raises:
            ProcessGroupError: If others fail, or do something else.
            RecordingError: If no loss was seen.
        """
        if not scale.known:
            raise RecordingError(
                "backpack(process_group=...) needs the loss, whose number of terms weighs the "
                "processes. Extend the loss module with backpack_ext.extend, or tie the value to one "
                "with backpack_ext.attach_loss."
            )
        names = Names()
        shares: list[Share] = []
        owners: dict[tuple, Extension] = {}
        for k, ext in enumerate(stores):
            head = (k, type(ext).__name__, ext.savefield)
            owners[head] = ext
            shares.append(Share(head, {}, ext.options()))  # says that the extension is there, and how
            if not ext.per_datum:
                for share in ext.shares(stores[ext], names):
                    share.key = (*head, *share.key)
                    shares.append(share)
        outlines = tuple(share.outline() for share in shares)
        digest = _digest(outlines)
        rows = self._agree(scale, digest)
        weight = self._weight(scale, rows)
        digests = tuple(row[4:6] for row in rows)
        if any(d != digests[0] for d in digests):
            agreed = _agreed.setdefault(self.group, {})
            if digests not in agreed:
                if len(agreed) >= REMEMBERED:
                    agreed.clear()
                agreed[digests] = self._exchange(outlines, names)
            outlines = agreed[digests]
            shares = self._complete(shares, outlines, names)
        self._sum(shares, weight)
        combined: dict[Extension, dict] = {}
        for head, ext in owners.items():
            mine = [share for share in shares if share.key[:3] == head and len(share.key) > 3]
            if ext.per_datum:
                combined[ext] = {}
                ext.merge(combined[ext], stores[ext], weight)
            else:
                combined[ext] = ext.of_shares(mine, names.parameters)
        return combined

    # ------------------------------------------------------------------ agreement

    def _agree(self, scale: LossScale, digest: tuple[float, float]) -> list[tuple[float, ...]]:
        """Return the rows of all processes: block, pass, terms, mean or not, digest."""
        self.passes += 1
        # what is not there yet when another process reads it: a row of zeros, hence block 0
        row = (_blocks.get(self.group, 0), self.passes, scale.terms or 0.0, scale.terms is not None)
        message = torch.zeros(self.size, 6, dtype=torch.float64)
        message[self.rank] = torch.tensor([*map(float, row), *digest], dtype=torch.float64)
        stage = "agreeing on what is to be summed"
        found = [tuple(r) for r in self._all_reduce([message.to(self.device)], stage)[0].tolist()]
        self._compare(found, slice(0, 2), "are in different steps", "(with-block, backward pass)")
        self._compare(found, slice(3, 4), "have losses of different reductions", "(is it a mean?)")
        return found

    def _compare(self, rows: list[tuple], columns: slice, what: str, which: str) -> None:
        values = [tuple(int(x) for x in row[columns]) for row in rows]
        if len(set(values)) > 1:
            told = ", ".join(f"rank {k}: {v}" for k, v in enumerate(values))
            raise ProcessGroupError(
                f"backpack(process_group=...): the processes {what}, {which} {told}. Each process has "
                "to run the same backward passes; one of them probably failed and went on, or entered a "
                "with-block without a backward pass. After that it takes a new process group."
            )

    def _weight(self, scale: LossScale, rows: list[tuple[float, ...]]) -> float:
        """Return what this process's loss must be multiplied with to be its part of the total."""
        if scale.terms is None:
            return 1.0
        return scale.terms / sum(row[2] for row in rows)

    def _exchange(self, outlines: Outlines, names: Names) -> Outlines:
        """Return what all processes have to add, the first one's order first."""
        stage = "exchanging descriptions of what is to be summed"
        trained = {name: p.requires_grad for name, p in names.parameters.items()}
        data = torch.frombuffer(bytearray(pickle.dumps((outlines, trained))), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(data)
        lengths = self._all_reduce([lengths.to(self.device)], stage)[0].tolist()
        message = torch.zeros(self.size, max(lengths), dtype=torch.uint8)
        message[self.rank, : len(data)] = data
        found = self._all_reduce([message.to(self.device)], stage)[0].cpu()
        told = [pickle.loads(found[k, :size].numpy().tobytes()) for k, size in enumerate(lengths)]
        union: dict[tuple, Outline] = {}
        for rank, (theirs, _) in enumerate(told):
            for outline in theirs:
                other = union.setdefault(outline.key, outline)
                union[outline.key] = _joined(other, outline, rank)
        # all processes check all of them, so that they raise together
        for outline in union.values():
            for rank, (theirs, known) in enumerate(told):
                if outline.key[:3] not in {their.key for their in theirs}:
                    raise _lacking(rank, f"extension {outline.key[1]}, saved in {outline.key[2]!r}")
                for _, name in outline.parameters:
                    if name not in known:
                        raise _lacking(rank, f"parameter {name!r}")
                    if not known[name]:
                        # zeros would count it as not used there
                        raise UnsupportedError(
                            f"backpack(process_group=...): parameter {name!r} is frozen on rank {rank} "
                            "and trained on another. Freeze the same parameters on all processes."
                        )
        return tuple(union.values())

    def _complete(self, shares: list[Share], outlines: Outlines, names: Names) -> list[Share]:
        """Return shares for all that was agreed on, with zeros for what is lacking here."""
        mine = {share.key: share for share in shares}
        complete = []
        for outline in outlines:
            share = mine.get(outline.key)
            if share is None:
                share = Share(outline.key, dict(outline.parameters), outline.frame)
            device = next((names.parameters[n].device for n in share.parameters.values()), self.device)
            parts = {}
            for name, shape, dtype in outline.parts:
                # expanded: takes no memory
                zeros = torch.zeros((), dtype=dtype, device=device).expand(shape)
                parts[name] = share.parts.get(name) or Part(zeros)
            share.parts = parts
            share.counts = {name: share.counts.get(name, 0) for name in outline.counts}
            complete.append(share)
        return complete

    # ------------------------------------------------------------------ sums

    def _sum(self, shares: list[Share], weight: float) -> None:
        """Put the sums over all processes into the shares' place."""
        buckets: list[_Bucket] = []
        running: dict[tuple, _Bucket] = {}
        for share in shares:
            for name, part in share.parts.items():
                kind = _wide(part.tensor.dtype), part.tensor.device
                bucket = running.get(kind)
                if bucket is None or bucket.bytes > BUCKET:
                    bucket = running[kind] = _Bucket(*kind)
                    buckets.append(bucket)
                bucket.add(share, name, part)
        counts = [(share, name) for share in shares for name in share.counts]
        messages = [bucket.pack(weight) for bucket in buckets]
        if counts:
            values = [float(share.counts[name]) for share, name in counts]
            messages.append(torch.tensor(values, dtype=torch.float64, device=self.device))
        if not messages:
            return
        sums = self._all_reduce(messages, "summing")
        if counts:
            for (share, name), value in zip(counts, sums.pop().tolist(), strict=True):
                share.counts[name] = value
        for bucket, message in zip(buckets, sums, strict=True):
            bucket.unpack(message)

    def _all_reduce(self, messages: list[Tensor], stage: str) -> list[Tensor]:
        """Sum messages in place over the group."""
        self.sent += sum(message.nbytes for message in messages)
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=self.timeout)
        options.asyncOp = True
        try:
            # not through torch.distributed.all_reduce, which takes no time limit
            works = [self.group.allreduce([message], options) for message in messages]
            for work in works:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise ProcessGroupError(
                f"backpack(process_group=...): rank {self.rank} of {self.size} got no answer while "
                f"{stage} (time limit {self.timeout:g} s). Another process probably failed, or ran no "
                f"backward pass inside its block: look at what it said. ({error})"
            ) from error
        return messages


class _Bucket:
    """Tensors of one data type and device, sent as one."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.bytes = dtype, device, 0
        self.parts: list[tuple[Share, str, Part]] = []

    def add(self, share: Share, name: str, part: Part) -> None:
        """Add a tensor."""
        self.parts.append((share, name, part))
        self.bytes += part.tensor.numel() * self.dtype.itemsize

    def _sizes(self) -> list[int]:
        return [part.tensor.numel() for _, _, part in self.parts]

    def pack(self, weight: float) -> Tensor:
        """Return all tensors, weighted, in a flat one."""
        message = torch.empty(sum(self._sizes()), dtype=self.dtype, device=self.device)
        for (_, _, part), view in zip(self.parts, message.split(self._sizes()), strict=True):
            factor = part.times * weight**part.power
            view.view(part.tensor.shape).copy_(part.tensor)
            if factor != 1:
                view.mul_(factor)
        return message

    def unpack(self, message: Tensor) -> None:
        """Put the sums into the shares' place, each in memory of its own."""
        for (share, name, part), view in zip(self.parts, message.split(self._sizes()), strict=True):
            value = view.view(part.tensor.shape)
            value = value.clone() if value.dtype == part.tensor.dtype else value.to(part.tensor.dtype)
            share.parts[name] = Part(value)


def _lacking(rank: int, what: str) -> ProcessGroupError:
    return ProcessGroupError(
        f"backpack(process_group=...): some process has results for the {what}, which rank {rank} does "
        "not have. All processes need the same model, called in the same way, and the same extensions."
    )


def _joined(one: Outline, other: Outline, rank: int) -> Outline:
    """Return an outline that has what either has."""
    if one == other:
        return one
    if len(one.key) == 3 and one.frame != other.frame:
        first, second = (dict(o.frame) for o in (one, other))
        names = [name for name in first | second if first.get(name) != second.get(name)]
        raise UnsupportedError(
            f"backpack(process_group=...): {one.key[1]} has other options on rank {rank} than on a rank "
            f"before it: {', '.join(names)}. Their results are no parts of one sum."
        )
    parts = {name: rest for name, *rest in one.parts}
    same = one.frame == other.frame and one.parameters == other.parameters
    if not same or any(parts.get(name, rest) != rest for name, *rest in other.parts):
        raise UnsupportedError(
            f"backpack(process_group=...): rank {rank} has other shapes, or another layout, for "
            f"{'.'.join(map(str, one.key))} than a rank before it: {other} instead of {one}. All "
            "processes need the same model, the same extensions and the same kind of data."
        )
    parts |= {name: rest for name, *rest in other.parts}
    counts = tuple(dict.fromkeys((*one.counts, *other.counts)))
    return one._replace(parts=tuple((name, *rest) for name, rest in parts.items()), counts=counts)


@lru_cache(maxsize=64)
def _digest(outlines: Outlines) -> tuple[float, float]:
    """Return two numbers of 48 bits, which float64 holds exactly."""
    data = sha256(repr(outlines).encode()).digest()
    return float(int.from_bytes(data[:6], "big")), float(int.from_bytes(data[6:12], "big"))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _device(group: dist.ProcessGroup) -> torch.device:
    """Return where small messages of a group live: on the CPU if its backend can."""
    kinds = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())
