qemu_allowlist_is_current() { false; }
