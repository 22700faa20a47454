# syntax=docker/dockerfile:1

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked && cp target/release/celeriac /celeriac

FROM debian:bookworm-slim
# Clones are made below TMPDIR; as a volume it takes the owner of this directory.
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin celeriac \
    && install -d -o celeriac -g celeriac -m 0700 /var/lib/celeriac
COPY --from=build /celeriac /usr/local/bin/celeriac
# The old commands go on working: celery -A celery_app inspect ping
RUN ln -s celeriac /usr/local/bin/celery
USER celeriac
ENV TMPDIR=/var/lib/celeriac
VOLUME /var/lib/celeriac
WORKDIR /var/lib/celeriac
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD celeriac inspect ping -d "celery@$HOSTNAME" || exit 1
CMD ["celeriac", "worker", "--loglevel=info", "-E", "--concurrency=4"]
