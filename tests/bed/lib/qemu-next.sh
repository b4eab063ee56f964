qemu_next_is_current() { false; }
