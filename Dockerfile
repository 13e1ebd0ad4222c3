# The S3 store, which does not run as root, so its user must own the folder.
FROM chrislusf/seaweedfs:4.48 AS s3
USER 0
RUN mkdir /objects && chown 1000:1000 /objects
USER 1000:1000

# One image for every service of docker-compose.yml that is ours.
FROM python:3.11-slim-trixie

# pg_dump and pg_restore of the same release as the database server, for `rlhf backup`.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes postgresql-client-17 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp rlhf \
    && install -d -o rlhf -g rlhf /data /scratch /backup /prefect
WORKDIR /app

# Packages first: they change less often than the code. TORCH=cuda installs the build from PyPI with
# CUDA's libraries, gigabytes that a machine without a GPU does not need.
ARG TORCH=cpu
COPY constraints.txt ./
RUN if [ "$TORCH" = cpu ]; then set -- --extra-index-url https://download.pytorch.org/whl/cpu; fi \
    && pip install --no-cache-dir --constraint constraints.txt torch "$@"
COPY pyproject.toml README.md LICENSE rlhf_command.py ./
COPY rlhf_core rlhf_core
COPY tasks tasks
COPY flows flows
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt '.[cluster,demo,gguf,stack]'

# The root file system is read-only; libraries write their own files to /tmp.
ENV HOME=/tmp PYTHONSAFEPATH=1
USER 10001
ENTRYPOINT ["python", "-P", "-m", "flows.local.container_entry"]
CMD ["rlhf", "--help"]
