#!/usr/bin/env python3
"""The demo's side of the writer in the guest; tests/bed/README.md specifies protocol and stream.

    writer.py relay SOCKET                  sends each line of standard input as a command, prints each answer
    writer.py prove SEED THREADS ZERO POINT...
        proves that each POINT is an exact instant of the stream, oldest first. A POINT is
        LABEL:BEFORE:AFTER:DISK,DISK: the writer's `status` answers around the backup, and raw images.
"""

import json
import socket
import sys
import time

SECTOR = 512
MASK = (1 << 64) - 1
# Writes after the newest stamp that can still have reached a disk: zeroing leaves no stamp.
STAMPLESS = 64
# Words 0..28 of a sector at once: 28 lanes of 128 bits, so that a product of 64 bits stays in its lane.
LANES = sum(1 << (128 * lane) for lane in range(28))
LOW = LANES * MASK
INDEX = sum(lane << (128 * lane) for lane in range(28))


def relay(path):
    """One connection for the whole time: what is on its way when one ends is lost."""
    deadline = time.monotonic() + 180
    with socket.socket(socket.AF_UNIX) as port:
        while port.connect_ex(path):
            if time.monotonic() > deadline:
                sys.exit("QEMU does not open the writer's port")
            time.sleep(0.1)
        lines = port.makefile("rw", newline="\n")
        for command in sys.stdin:
            # The port keeps a command until the guest has booted.
            port.settimeout(180)
            lines.write(command)
            lines.flush()
            print(next_answer(lines), end="", flush=True)


def next_answer(lines):
    while line := lines.readline():
        if "event" not in json.loads(line):
            return line
    sys.exit("the guest is gone")


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def mix_lanes(x):
    """`mix` in each of the 28 lanes."""
    x = (x + LANES * 0x9E3779B97F4A7C15) & LOW
    x = ((x ^ (x >> 30 & LOW)) & LOW) * 0xBF58476D1CE4E5B9 & LOW
    x = ((x ^ shifted(x, 27)) & LOW) * 0x94D049BB133111EB & LOW
    return x ^ shifted(x, 31)


def shifted(x, count):
    return x >> count & LANES * (MASK >> count)


class Stream:
    def __init__(self, seed, threads, zero, sizes):
        self.seed, self.threads, self.zero, self.sizes = seed, threads, zero, sizes

    def region(self, thread, disk):
        size = self.sizes[disk]
        share = size // self.threads // 4096 * 4096
        start = thread * share
        return start, size // 512 * 512 if thread == self.threads - 1 else start + share

    def op(self, thread, number):
        """disk, first sector, last sector + 1, whether it zeroes, a"""
        disk = (number - 1) % len(self.sizes)
        a = mix(self.seed ^ mix(thread << 32) ^ mix(number))
        b = mix(a)
        start, end = self.region(thread, disk)
        unit = 512 if a % 8 == 0 else 4096
        offset = start + mix(b) % ((end - start) // unit) * unit
        length = min(unit * (1 + b % 8), (end - offset) // 512 * 512)
        return disk, offset // 512, (offset + length) // 512, (a >> 32) % 100 < self.zero, a

    def sector(self, thread, number, disk, at):
        """What this write leaves in a sector."""
        _, _, _, zero, a = self.op(thread, number)
        if zero:
            return bytes(SECTOR)
        o = at * SECTOR
        lanes = mix_lanes(LANES * (a ^ o) ^ INDEX).to_bytes(28 * 16, "little")
        words = b"".join(lanes[i : i + 8] for i in range(0, len(lanes), 16))
        head = b"VFWRITE1" + thread.to_bytes(4, "little") + disk.to_bytes(4, "little")
        return head + number.to_bytes(8, "little") + o.to_bytes(8, "little") + words + bytes([number % 251 + 1]) * 256


class Replay:
    """Per disk and sector the number of the last write; it only goes forward."""

    def __init__(self, stream):
        self.stream = stream
        self.owners = [[0] * (size // SECTOR) for size in stream.sizes]
        self.numbers = [0] * stream.threads

    def advance(self, thread, number):
        for n in range(self.numbers[thread] + 1, number + 1):
            disk, first, end, _, _ = self.stream.op(thread, n)
            self.owners[disk][first:end] = [n] * (end - first)
        self.numbers[thread] = max(number, self.numbers[thread])

    def matches(self, thread, disk, at, image):
        found = image[at * SECTOR : (at + 1) * SECTOR]
        number = self.owners[disk][at]
        return found == (self.stream.sector(thread, number, disk, at) if number else bytes(SECTOR))


def newest_stamp(stream, thread, images):
    newest = 0
    for disk, image in enumerate(images):
        start, end = stream.region(thread, disk)
        for offset in range(start, end, SECTOR):
            if image[offset : offset + 8] == b"VFWRITE1":
                newest = max(newest, int.from_bytes(image[offset + 16 : offset + 24], "little"))
    return newest


def instant(replay, thread, images):
    """Moves the thread to the write after which the images were cut, and says whether the next one is there in part."""
    stream = replay.stream
    newest = newest_stamp(stream, thread, images)
    # One before the newest, because the newest may be there in part.
    replay.advance(thread, max(newest - 1, replay.numbers[thread]))
    different = set()
    for disk, image in enumerate(images):
        start, end = stream.region(thread, disk)
        for at in range(start // SECTOR, end // SECTOR):
            if not replay.matches(thread, disk, at, image):
                different.add((disk, at))
    while different:
        number = replay.numbers[thread] + 1
        disk, first, end, _, _ = stream.op(thread, number)
        inside = all(d == disk and first <= at < end for d, at in different)
        if inside and all(
            images[d][at * SECTOR : (at + 1) * SECTOR] == stream.sector(thread, number, d, at) for d, at in different
        ) and len(different) < end - first:
            return True
        if number > newest + STAMPLESS:
            disk, at = min(different)
            sys.exit(
                f"NOT an instant: thread {thread}, disk {disk}, byte {at * SECTOR}: write {replay.owners[disk][at]} "
                f"should be there with writes up to {newest} ({len(different)} sectors differ)"
            )
        replay.advance(thread, number)
        for at in range(first, end):
            if replay.matches(thread, disk, at, images[disk]):
                different.discard((disk, at))
            else:
                different.add((disk, at))
    return False


def prove(seed, threads, zero, points):
    replay = None
    for point in points:
        label, before, after, disks = point.split(":")
        before, after = (json.load(open(path))["writes"] for path in (before, after))
        images = [open(path, "rb").read() for path in disks.split(",")]
        if replay is None:
            replay = Replay(Stream(seed, threads, zero, [len(image) for image in images]))
        partial = [instant(replay, thread, images) for thread in range(threads)]
        numbers = replay.numbers
        for thread, (low, number, high) in enumerate(zip(before, numbers, after)):
            # Zeroing writes that change nothing leave no trace: they can be there although the last trace is older.
            trace = next((n for n in range(low, number, -1) if not stampless(replay, thread, n)), None)
            if trace is not None or number > high + 1:
                sys.exit(f"{label}: thread {thread} was cut at write {number}, but the writer was at {low}..{high}")
        total = sum(numbers)
        print(
            f"  {label}: exactly the first {total} writes ({', '.join(map(str, numbers))} of the {threads} threads), "
            f"{sum(partial)} in flight; the writer was between {sum(before)} and {sum(after)}"
        )


def stampless(replay, thread, number):
    return replay.stream.op(thread, number)[3]


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "relay":
        relay(arguments[0])
    else:
        prove(int(arguments[0]), int(arguments[1]), int(arguments[2]), arguments[3:])
