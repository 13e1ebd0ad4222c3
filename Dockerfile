# One image for the three services of docker-compose.yml: Prefect server, MLflow server, worker.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 10001 rlhf && install -d -o rlhf /app /data
WORKDIR /app

# The packages first: they change less often than the code. On a machine without a GPU, build with
# --build-arg PIP_EXTRA_INDEX_URL=<the index of PyTorch's CPU builds> to spare the CUDA libraries.
ARG PIP_EXTRA_INDEX_URL=""
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY rlhf_core rlhf_core
COPY tasks tasks
COPY flows flows
RUN pip install --no-cache-dir --constraint constraints.txt .
COPY configs configs

USER rlhf
ENV RLHF_HOME=/data HOME=/home/rlhf
ENTRYPOINT ["rlhf"]
CMD ["--help"]
