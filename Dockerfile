# The server in a container, the bundle mounted. PyPI's torch is the CUDA build; for the CPU build give pip's options as
# PyTorch's install page names them:
#   docker build -t r2ec-serve --build-arg TORCH_OPTIONS="--index-url INDEX_OF_CPU_WHEELS" .
#   docker run -p 8000:8000 -v $PWD/outputs/demo/bundle:/bundle -e R2EC_TRL_TOKEN r2ec-serve      # CUDA: --gpus all
# No Docker engine was at hand: each RUN, COPY, USER, HEALTHCHECK and CMD was run by hand in a fresh Debian 12 tree with
# its Python 3.11 and the CPU build of torch. Not yet run: FROM, the CUDA build, and `docker build` itself. User 10001
# must be able to write the bundle where its catalogue is to change.
FROM python:3.11-slim
ARG TORCH_OPTIONS=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 HF_HUB_OFFLINE=1
WORKDIR /app
RUN pip install ${TORCH_OPTIONS} "torch>=2.11,<2.14"
COPY . .
RUN pip install ".[page]" && useradd --uid 10001 --create-home serve
USER serve
VOLUME /bundle
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["python", "recipes/serve.py", "--bundle", "/bundle", "--host", "0.0.0.0"]
