# The worker and the command line, for a ClickHouse server: no chDB, no Java, no compiler.
FROM python:3.13.16-slim-trixie AS build

# Faust publishes no wheel for arm64; there its extensions are compiled.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/creditstream
ENV PATH=/opt/creditstream/bin:$PATH

COPY requirements-worker.lock /build/
RUN pip install --require-hashes --requirement /build/requirements-worker.lock

COPY pyproject.toml README.md LICENS[E] /build/
COPY schemas /build/schemas
COPY sinks /build/sinks
COPY streams /build/streams
COPY creditstream /build/creditstream
RUN pip install --no-deps /build && pip check


FROM python:3.13.16-slim-trixie

RUN useradd --uid 10001 --home-dir /var/lib/creditstream --create-home --shell /usr/sbin/nologin creditstream
COPY --from=build /opt/creditstream /opt/creditstream

ENV PATH=/opt/creditstream/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    CREDITSTREAM_HOME=/var/lib/creditstream \
    CREDITSTREAM_API_HOST=0.0.0.0 \
    CREDITSTREAM_API_PORT=8620
USER creditstream
WORKDIR /var/lib/creditstream
EXPOSE 8620

# An incident makes the worker unready, not dead: nothing may restart it for that. Whatever proxy the
# container is given leads out, and is not asked.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["python", "-c", \
         "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8620/readyz', timeout=4)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["creditstream"]
CMD ["worker"]
