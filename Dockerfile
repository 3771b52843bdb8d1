# CPU:  docker build -t w2v2 .
# CUDA: docker build -t w2v2:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#       docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -e HOME=/tmp -v "$PWD:/work" w2v2:cuda \
#           pretrain base --data manifest --out runs/base
# Workers hand batches over in /dev/shm, of which Docker gives 64 MB without --ipc=host. There is no compiler for --train.compile.
FROM python:3.12-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/w2v2
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0 \
    && pip install --no-cache-dir -c constraints.txt '.[synth,hf,m4a,s3,beam,pieces,onnx,vad,serve]' \
    && useradd --create-home --uid 1000 w2v2
USER 1000
WORKDIR /work
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["w2v2"]
CMD ["--help"]
