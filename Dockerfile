# logitmill on CPU, or with `--build-arg TORCH=cuda` on CUDA.

FROM python:3.11-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG TORCH=cpu
# PyPI's torch brings CUDA along; the CPU build comes from PyTorch's own index.
RUN if [ "$TORCH" = cpu ]; then \
        pip install --no-cache-dir "torch>=2.13,<2.14" \
            --index-url https://download.pytorch.org/whl/cpu; \
    else \
        pip install --no-cache-dir "torch>=2.13,<2.14"; \
    fi
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl \
    && useradd --create-home --uid 1000 logitmill \
    && install --directory --owner logitmill --group logitmill /data
USER 1000
ENV LOGITMILL_HOME=/data LOGITMILL_HOST=0.0.0.0
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["logitmill"]
CMD ["serve"]
