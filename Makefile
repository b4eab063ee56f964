# `make help` says what there is.
.PHONY: help demo test soak fuzz bench check generate

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: ## Backs up a real guest that writes, kills a backup, restores, proves the bytes (root; some minutes)
	tests/demo/run

test: ## Sets up the test bed and runs all tests (root, for packages)
	tests/bed/setup
	cargo test --locked $(TEST_FLAGS) -- --test-threads=2

soak: ## Hundreds of backups with random failures (VIRT_FLEECE_SOAK_CYCLES, default 100)
	tests/bed/setup
	cargo test --locked --test it soak -- --ignored --nocapture --test-threads=1

fuzz: ## Feeds hostile input to every decoder, a minute each (FUZZ_SECONDS; needs nightly and cargo-fuzz)
	fuzz/run $(FUZZ_SECONDS)

bench: ## Measures on a real guest
	bench/run

check: ## Formatting and lints, as CI checks them
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

generate: ## Writes the generated files: definitions, their reference, what the chart has of them, deploy/
	cargo run --locked --quiet -- crds --directory crds
	cargo run --locked --quiet -- crds --reference >docs/reference.md
	charts/render
