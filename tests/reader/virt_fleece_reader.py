#!/usr/bin/env python3
"""An independent reader of virt-fleece repositories in a directory, format version 1: docs/format.md.

    virt_fleece_reader.py REPOSITORY_DIR --passphrase-file FILE list
    virt_fleece_reader.py REPOSITORY_DIR --passphrase-file FILE restore --backup ID --volume NAME OUTPUT

It shares no code with virt-fleece, trusts nothing that is not authenticated, and needs Python 3.11 with blake3,
cryptography and zstandard. A sparse raw image is written; an OUTPUT that exists is refused.
"""

import argparse
import hmac
import json
import os
import re
import sys

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

MAGIC = b"VFR1"
CHUNK, MANIFEST, KEY = 1, 2, 3
OVERHEAD = 4 + 1 + 24 + 16
FANOUT = 1024
ZERO = bytes(32)
MIN_CHUNK, MAX_CHUNK = 64 << 10, 8 << 20
MAX_CONFIG, MAX_SLOT, MAX_SLOTS, MAX_MANIFEST = 16 << 10, 64 << 10, 64, 16 << 20
MAX_VIRTUAL_SIZE = 1 << 56
BACKUP_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")


class Damaged(Exception):
    """Something is not as it was written, or not for this reader."""


def need(condition, what):
    if not condition:
        raise Damaged(what)


def unhex(text, length, what):
    good = isinstance(text, str) and len(text) == 2 * length and re.fullmatch("[0-9a-f]*", text)
    need(good, f"{what} is not {length} bytes in hex")
    return bytes.fromhex(text)


def number(value, low, high, what):
    need(type(value) is int and low <= value <= high, f"{what} is out of range")
    return value


def keyed(key, content):
    return blake3(content, key=key).digest()


def parse(document, what):
    try:
        value = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} is no JSON: {error}") from error
    need(isinstance(value, dict), f"{what} is no JSON object")
    return value


def exactly(value, required, optional, what):
    keys = set(value)
    need(set(required) <= keys <= set(required) | set(optional), f"{what} has missing or unknown fields")


def open_sealed(key, kind, repository, name, sealed, what):
    """Authenticates and decrypts a sealed object."""
    need(len(sealed) >= OVERHEAD, f"{what} is too short")
    need(sealed[:4] == MAGIC and sealed[4] == kind, f"{what} is no sealed object of kind {kind}")
    object_key = keyed(key, sealed[5:29])
    try:
        return AESGCM(object_key).decrypt(bytes(12), sealed[29:], MAGIC + bytes([kind]) + repository + name)
    except InvalidTag as error:
        raise Damaged(f"the seal of {what} is broken") from error


def unpack(packed, length, what):
    """Undoes the packing of content of a known length."""
    need(packed, f"{what} is empty")
    content = packed[1:]
    if packed[0] == 1:
        try:
            # The library believes a size that a frame claims, so it is looked at first.
            need(zstandard.frame_content_size(content) == length, f"{what} claims another length")
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damaged(f"{what} does not decompress: {error}") from error
    else:
        need(packed[0] == 0, f"{what} is packed by an unknown method")
    need(len(content) == length, f"{what} has another length")
    return content


class Repository:
    def __init__(self, directory, passphrase):
        self.directory = directory
        document = self.read("repository.json", MAX_CONFIG)
        config = parse(document, "repository.json")
        need(config.get("format") == "virt-fleece repository", "it is no repository")
        need(config.get("version") == 1, f"format version {config.get('version')} is not known")
        exactly(config, ["format", "version", "id", "chunk_size", "created", "mac"], [], "repository.json")
        self.id = unhex(config["id"], 16, "the id of the repository")
        self.chunk_size = number(config["chunk_size"], MIN_CHUNK, MAX_CHUNK, "the chunk size")
        need(self.chunk_size & (self.chunk_size - 1) == 0, "the chunk size is no power of two")
        need(isinstance(config["created"], str), "the time is no text")
        self.master = self.unlock(passphrase)
        signed = "".join(f"{config[field]}\n" for field in ["format", "version", "id", "chunk_size", "created"])
        mac = keyed(self.derive("config"), signed.encode())
        need(hmac.compare_digest(mac, unhex(config["mac"], 32, "the MAC")), "repository.json was changed")
        self.ids, self.tags = self.derive("chunk id"), self.derive("vm tag")
        self.chunks, self.manifests = self.derive("chunk"), self.derive("manifest")

    def read(self, name, limit):
        try:
            with open(os.path.join(self.directory, *name.split("/")), "rb") as file:
                content = file.read(limit + 1)
        except FileNotFoundError as error:
            raise Damaged(f"{name} is missing") from error
        need(len(content) <= limit, f"{name} is too large")
        return content

    def names(self, directory):
        for path, _, files in sorted(os.walk(os.path.join(self.directory, directory))):
            # A name with # is a write that was cut short.
            for file in sorted(file for file in files if "#" not in file):
                yield os.path.relpath(os.path.join(path, file), self.directory).replace(os.sep, "/")

    def derive(self, purpose):
        return blake3(self.master, derive_key_context=f"virt-fleece repository v1 {purpose}").digest()

    def unlock(self, passphrase):
        names = list(self.names("keys"))
        need(len(names) <= MAX_SLOTS, "there are too many key slots")
        for name in names:
            try:
                return self.unlock_slot(name, passphrase)
            except Damaged as error:
                print(f"{name}: {error}", file=sys.stderr)
        raise Damaged("no key slot opens with this passphrase")

    def unlock_slot(self, name, passphrase):
        slot = parse(self.read(name, MAX_SLOT), name)
        exactly(slot, ["id", "created", "kdf", "sealed"], ["label"], name)
        identity, kdf = slot["id"], slot["kdf"]
        unhex(identity, 8, "its id")
        need(name == f"keys/{identity}.json", "it is another slot")
        need(isinstance(kdf, dict), "its kdf is no JSON object")
        exactly(kdf, ["algorithm", "memory_kib", "iterations", "parallelism", "salt"], [], "kdf")
        need(kdf["algorithm"] == "argon2id", "its key derivation is unknown")
        lanes = number(kdf["parallelism"], 1, 16, "parallelism")
        memory = number(kdf["memory_kib"], 8 * lanes, 1 << 20, "memory_kib")
        iterations = number(kdf["iterations"], 1, 32, "iterations")
        salt = unhex(kdf["salt"], 16, "its salt")
        # Before the work is done: a slot of another length may be made to open with many passphrases.
        sealed = unhex(slot["sealed"], OVERHEAD + 32, "its sealed key")
        argon2 = Argon2id(salt=salt, length=32, iterations=iterations, lanes=lanes, memory_cost=memory)
        return open_sealed(argon2.derive(passphrase), KEY, self.id, identity.encode(), sealed, "the slot")

    def manifest(self, name):
        sealed = self.read(name, MAX_MANIFEST + 9 + OVERHEAD)
        content = open_sealed(self.manifests, MANIFEST, self.id, name.encode(), sealed, name)
        need(len(content) > 8, f"{name} is too short")
        length = number(int.from_bytes(content[:8], "little"), 1, MAX_MANIFEST, "the length of the manifest")
        manifest = parse(unpack(content[8:], length, name), name)
        need(manifest.get("format_version") == 1, f"{name} has an unknown format version")
        identity, vm = manifest.get("id"), manifest.get("vm")
        need(isinstance(identity, str) and isinstance(vm, str), f"{name} names no backup")
        need(BACKUP_ID.fullmatch(identity), f"{name} has no valid id")
        tag = keyed(self.tags, vm.encode())[:16].hex()
        need(name == f"backups/{tag}/{identity}", f"{name} is the manifest of another backup")
        volumes = manifest.get("volumes")
        need(isinstance(volumes, list), f"{name} has no volumes")
        for volume in volumes:
            need(isinstance(volume, dict) and isinstance(volume.get("name"), str), f"{name} has a volume without a name")
            number(volume.get("virtual_size"), 0, MAX_VIRTUAL_SIZE, "the size of a volume")
            unhex(volume.get("root"), 32, "the root of a volume")
        need(len({volume["name"] for volume in volumes}) == len(volumes), f"{name} has two volumes of one name")
        return manifest

    def chunk(self, identity, length):
        """The content of a chunk or page, proved to be what its id says."""
        digits = identity.hex()
        name = f"chunks/{digits[:2]}/{digits}"
        sealed = self.read(name, length + 1 + OVERHEAD)
        content = unpack(open_sealed(self.chunks, CHUNK, self.id, identity, sealed, name), length, name)
        need(keyed(self.ids, content) == identity, f"{name} is not what its id says")
        return content

    def leaves(self, volume):
        """Ids of the chunks of a volume, a leaf page at a time: number of the first, and ids (None: all zero)."""
        size, root = volume["virtual_size"], bytes.fromhex(volume["root"])
        ids = [-(-size // self.chunk_size)]
        while len(ids) < 2 or ids[-1] > 1:
            ids.append(-(-ids[-1] // FANOUT))
        if size == 0:
            need(root == ZERO, "a volume without chunks has an index")
            return

        def walk(level, page, identity):
            if identity == ZERO:
                yield page * FANOUT**level, None
                return
            count = min(FANOUT, ids[level - 1] - page * FANOUT)
            content = self.chunk(identity, 32 * count)
            below = [content[at : at + 32] for at in range(0, len(content), 32)]
            if level == 1:
                yield page * FANOUT, below
            else:
                for position, child in enumerate(below):
                    yield from walk(level - 1, page * FANOUT + position, child)

        yield from walk(len(ids) - 1, 0, root)

    def restore(self, volume, output):
        size = volume["virtual_size"]
        # Under another name until it is whole.
        with open(output + ".partial", "xb") as file:
            for first, ids in self.leaves(volume):
                for index, identity in enumerate(ids or [], first):
                    if identity != ZERO:
                        start = index * self.chunk_size
                        file.seek(start)
                        file.write(self.chunk(identity, min(self.chunk_size, size - start)))
            file.truncate(size)
        os.link(output + ".partial", output)
        os.unlink(output + ".partial")


def run(arguments):
    with open(arguments.passphrase_file, "rb") as file:
        passphrase = file.read().removesuffix(b"\n").rstrip(b"\r")
    repository = Repository(arguments.repository, passphrase)
    for name in repository.names("backups"):
        identity = name.rsplit("/", 1)[-1]
        if not BACKUP_ID.fullmatch(identity) or arguments.command == "restore" and identity != arguments.backup:
            continue
        manifest = repository.manifest(name)
        if arguments.command == "list":
            for volume in manifest["volumes"]:
                print(manifest["id"], manifest["vm"], volume["name"], volume["virtual_size"], sep="\t")
            continue
        for volume in manifest["volumes"]:
            if volume["name"] == arguments.volume:
                return repository.restore(volume, arguments.output)
        raise Damaged(f"the backup has no volume {arguments.volume}")
    need(arguments.command == "list", "there is no such backup")


def main():
    parser = argparse.ArgumentParser(description="Reads virt-fleece repositories, format version 1.")
    parser.add_argument("repository", metavar="REPOSITORY_DIR")
    parser.add_argument("--passphrase-file", required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    restore = commands.add_parser("restore")
    restore.add_argument("--backup", required=True)
    restore.add_argument("--volume", required=True)
    restore.add_argument("output", metavar="OUTPUT")
    try:
        run(parser.parse_args())
    except (Damaged, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
