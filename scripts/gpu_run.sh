#!/usr/bin/env bash
# One run over slices of a machine that is lent for minutes: corpus, pretraining, probe, CTC, WER. Call it again with the
# same words until it exits with 0; 75: the time was up, all is saved.
#
#   export FINETUNE="--train.accumulate 1 --optim.schedule.total-steps 1500 --freeze-encoder-steps 200"
#   short="--data.batch-seconds 350 --train.accumulate 1 --data.num-workers 8 --optim.schedule.warmup-steps 150
#       --optim.schedule.total-steps 2000 --train.checkpoint-every 200"
#   scripts/gpu_run.sh base ctc_10m runs/gpu $short --warm-start.updates 600
#   scripts/gpu_run.sh base ctc_10m runs/gpu-cold $short --warm-start.updates 0
#
# Without such settings base is its 400,000 updates of 1.6 h. An update has to end in the last 25 s of a slice.
# What follows the folder goes to w2v2 pretrain, FINETUNE="--train.max-steps 2000" to w2v2 finetune. On a GPU with bf16
# that is the precision. SLICE: seconds of a call (570), of which the last are for saving. HOURS of synthetic speech (20),
# made on the machine. DATA: a prepared corpus instead; real speech is carried as Opus, 15 MB an hour and less:
#   w2v2 prepare LibriSpeech corpus --shards opus
set -uo pipefail
[ $# -ge 3 ] || { sed -n '2,17s/^# \?//p' "$0" >&2; exit 2; }
pretrain=$1 finetune=$2 out=$3
shift 3
data=${DATA:-$out/corpus} labels=${LABELS:-$out/corpus-audio}
end=$(($(date +%s) + ${SLICE:-570} - 30))

# A command until the slice ends. w2v2 saves on SIGTERM, this script's too; what has not ended is taken up by the next call.
stage() {
    local left=$((end - $(date +%s))) code=0
    [ $left -gt 0 ] || exit 75
    timeout --preserve-status --signal=TERM --kill-after=25 $left ${W2V2:-w2v2} "$@" &
    child=$!
    trap 'kill -TERM $child' TERM INT
    while wait $child; code=$?; kill -0 $child 2>/dev/null; do :; done
    case $code in
    0) ;;
    137) echo "killed before all was saved: the next call goes on from the last checkpoint" >&2 && exit 75 ;;
    75 | 143) exit 75 ;;
    *) exit $code ;;
    esac
}

mkdir -p "$out"
[ -n "${DATA:-}" ] || [ -f "$data/corpus.json" ] || stage prepare synthetic "$data" --hours "${HOURS:-20}"
[ -f "$out/pretrain/model.safetensors" ] ||
    stage pretrain "$pretrain" --data "$data" --out "$out/pretrain" --resume auto "$@"
if [ -d "$labels" ] && [ ! -f "$out/probe.json" ]; then
    stage evaluate "$out/pretrain" --data "$data" --probe --labels "$labels" --json >"$out/probe.partial"
    mv "$out/probe.partial" "$out/probe.json"
fi
[ -f "$out/finetuned/model.safetensors" ] ||
    stage finetune "$finetune" --data "$data" --init-from "$out/pretrain" --minutes "${MINUTES:-10}" \
        --out "$out/finetuned" --resume auto ${FINETUNE:-}
stage evaluate "$out/finetuned" --data "$data" --json >"$out/evaluation.json"
