# syntax=docker/dockerfile:1

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked && cp target/release/celeriac /celeriac

# What the binary needs beside itself is libc; busybox is there for people and the health check.
FROM debian:bookworm-slim AS root
RUN apt-get update && apt-get install --yes --no-install-recommends busybox
COPY --from=build /celeriac /image/usr/local/bin/celeriac
WORKDIR /image
RUN set -eu; \
    install -D /bin/busybox bin/busybox; \
    for library in $(ldd usr/local/bin/celeriac bin/busybox | grep -o '/lib[^ ]*'); do \
        install -D "$library" ".$library"; \
    done; \
    for tool in $(bin/busybox --list); do ln -s /bin/busybox "bin/$tool" 2>/dev/null || :; done; \
    # The old commands go on working: celery -A celery_app inspect ping
    ln -s celeriac usr/local/bin/celery; \
    install -d etc; \
    echo 'celeriac:x:10001:10001::/var/lib/celeriac:/bin/sh' >etc/passwd; \
    echo 'celeriac:x:10001:' >etc/group; \
    echo 'hosts: files dns' >etc/nsswitch.conf; \
    install -d -m 1777 tmp; \
    # Clones are made below TMPDIR; as a volume it takes the owner of this directory.
    install -d -o 10001 -g 10001 -m 0700 var/lib/celeriac

FROM scratch
COPY --from=root /image /
USER celeriac
ENV PATH=/usr/local/bin:/bin TMPDIR=/var/lib/celeriac
VOLUME /var/lib/celeriac
WORKDIR /var/lib/celeriac
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD celeriac inspect ping -d "celery@$HOSTNAME" || exit 1
CMD ["celeriac", "worker", "--loglevel=info", "-E", "--concurrency=4"]
