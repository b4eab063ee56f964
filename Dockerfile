# The one program of virt-fleece, in an image of nothing else.
#
# Static (musl): the image needs no C library, so there is no distribution in it whose holes have to be followed, no
# shell and no package manager. The certificates are the one other file: without them no S3 server is believed.
# What it may cost is musl's allocator, which is slower under many threads; the numbers of docs/performance.md are of a
# build with glibc.
#
#   docker build -t virt-fleece:0.1.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 -t virt-fleece:0.1.0 .

ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-bookworm AS build
# musl-gcc and cmake: for aws-lc and zstd, which are C.
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake musl-tools ca-certificates \
    && rm -rf /var/lib/apt/lists/*
RUN rustup target add "$(uname -m)-unknown-linux-musl"
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    target="$(uname -m)-unknown-linux-musl" \
    && CC_x86_64_unknown_linux_musl=musl-gcc CC_aarch64_unknown_linux_musl=musl-gcc \
        cargo build --locked --release --bin virt-fleece --target "$target" \
    && install -D "target/$target/release/virt-fleece" /out/usr/bin/virt-fleece \
    # Static, or the empty image below could not run it.
    && ! ldd /out/usr/bin/virt-fleece 2>/dev/null \
    && /out/usr/bin/virt-fleece --version
RUN install -D /etc/ssl/certs/ca-certificates.crt /out/etc/ssl/certs/ca-certificates.crt \
    && mkdir -m 1777 /out/tmp

FROM scratch
COPY --from=build /out /
COPY LICENSE /licenses/LICENSE
# Controller and movers. The agent's pod says that it is root.
USER 65532:65532
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
LABEL org.opencontainers.image.title="virt-fleece" \
      org.opencontainers.image.description="Fleecing backups of running QEMU and KubeVirt virtual machines" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/virt-fleece/virt-fleece"
ENTRYPOINT ["/usr/bin/virt-fleece"]
