# adapterkit for CPUs: no root, no compiler, no CUDA; runs with a read-only root file system.
#   docker build -t adapterkit .
#   docker run --rm --read-only --tmpfs /tmp -v ./models:/models adapterkit merge /models/base /models/adapter -o /models/merged
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=gguf
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/adapterkit
COPY constraints.txt /src/
RUN cd /src && grep '^torch==' constraints.txt > torch.txt && \
    /opt/adapterkit/bin/pip install --index-url "$TORCH_INDEX" -r torch.txt
COPY pyproject.toml README.md LICENSE /src/
COPY adapterkit /src/adapterkit
RUN /opt/adapterkit/bin/pip install -c /src/constraints.txt "/src[$EXTRAS]"

FROM python:${PYTHON}-slim
RUN useradd --uid 1000 --create-home adapterkit
COPY --from=build /opt/adapterkit /opt/adapterkit
ENV PATH=/opt/adapterkit/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/tmp/numba \
    HF_HOME=/models/.huggingface \
    ADAPTERKIT_HOME=/models/.adapterkit
USER adapterkit
WORKDIR /models
ENTRYPOINT ["adapterkit"]
CMD ["--help"]
