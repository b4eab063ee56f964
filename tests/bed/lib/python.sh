# A Python for the independent reader of the repository format: the system's interpreter, with a few packages that are
# pinned by hash in python/requirements.txt and are wheels, so that nothing is compiled.

PYTHON_REQUIREMENTS=$BED_SOURCE/python/requirements.txt

# The system's Python, as in qemu-allowlist. An upgrade of it leaves the packages behind: so it is part of the key.
python_key() { key_of "$BED_SOURCE/lib/python.sh" "$PYTHON_REQUIREMENTS" <(/usr/bin/python3 --version 2>&1 || true); }

python_is_current() { is_current python "$(python_key)"; }

build_python() {
    local work venv
    # ensurepip is what Debian splits off into python3-venv.
    if ! /usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null; then
        say "python: installing python3-venv"
        update_lists
        install_packages python3-venv
    fi
    work=$(new_directory python)
    venv=$work/out

    say "python: installing what requirements.txt pins"
    quietly /usr/bin/python3 -m venv "$venv"
    quietly env -u PYTHONPATH -u PYTHONHOME -u PIP_TARGET -u PIP_PREFIX -u PIP_USER "$venv/bin/python" -m pip install --quiet \
        --disable-pip-version-check --no-cache-dir --require-hashes --only-binary :all: -r "$PYTHON_REQUIREMENTS"
    # Scripts name the directory they were made in. The interpreter finds its packages wherever it is moved to.
    find "$venv/bin" -mindepth 1 ! -name 'python*' -delete
    # Proven before it is put in place: each of them has parts that are compiled.
    quietly "$venv/bin/python" -I - <<'PROOF'
import blake3, zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

assert zstandard.ZstdDecompressor().decompress(zstandard.ZstdCompressor().compress(b"x" * 99)) == b"x" * 99
key = Argon2id(salt=b"s" * 16, length=32, iterations=1, lanes=1, memory_cost=64).derive(b"password")
assert len(blake3.blake3(b"x", key=key).digest()) == 32
for cipher in AESGCM(key), ChaCha20Poly1305(key):
    assert cipher.decrypt(b"n" * 12, cipher.encrypt(b"n" * 12, b"x", b"a"), b"a") == b"x"
PROOF
    publish python "$(python_key)" "$venv"
    rm -rf "$work"
    say "python: done ($("$BED/python/bin/python" --version), $(du -sh "$BED/python" | cut -f 1))"
}
