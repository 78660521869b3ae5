#!/usr/bin/env bash
# All that one GPU has to show, in parts, under 20 minutes: the tests that need one, and the benchmarks beside PyTorch.
#
#   scripts/bench/gpu.sh [--small] [--minutes=20] [--only=tests,step] [--output=DIR] [--python=PYTHON] [--patience=1]
#                        [--revision=COMMIT]
#
# Each part has a time limit and writes its JSON into DIR (docs/benchmarks) under the card's name. A part that is there
# for this very code is not run again, and one for which too little of --minutes is left is not begun, so that the same
# command, and DIR as it is, go on with the next where a lease ended; a part that fails is named at the end, and its log
# is in DIR/gpu-logs. --small has tiny sizes, also on a CPU: it shows that all parts run. The time limits are multiplied
# by --patience. --revision is what the results say of the code where the copy has no .git.
#
# Nothing is fetched and nothing need be installed but the packages: the clone is imported as it lies. What PYTHON
# (python3) lacks of them is named at the start, with the command that downloads the wheels elsewhere; without PyTorch
# the comparisons are left out. The peer's pass of LESS is transcribed to PyTorch, for DataFlex's own environment is one
# of a CPU.
set -uo pipefail
caller=$PWD
cd "$(dirname "$0")/../.."

parts=tests,train_speed,less,per_example_gradients,step,resume
small= minutes=20 only=$parts output=docs/benchmarks python=python3 patience=1 revision=
for argument in "$@"; do
    case $argument in
        --small) small=--small ;;
        --minutes=*) minutes=${argument#*=} ;;
        --only=*) only=${argument#*=} ;;
        --output=*) output=${argument#*=} ;;
        --python=*) python=${argument#*=} ;;
        --patience=*) patience=${argument#*=} ;;
        --revision=*) revision=${argument#*=} ;;
        *)
            echo "error: $argument: accepted are --small, --minutes=, --only=, --output=, --python=, --patience=," \
                "--revision=" >&2
            exit 2
            ;;
    esac
done
# Paths are the caller's; a name without a slash is a command.
[[ $output == /* || $output == docs/benchmarks ]] || output=$caller/$output
[[ $python != */* || $python == /* ]] || python=$caller/$python
for number in "$minutes" "$patience"; do
    [[ $number =~ ^[0-9]*\.?[0-9]+$ ]] || { echo "error: $number: must be a number" >&2; exit 2; }
done
for name in ${only//,/ }; do
    [[ ,$parts, == *,$name,* ]] || { echo "error: --only: $name: must be one of $parts" >&2; exit 2; }
done
evaluated() { awk "BEGIN { print ($1) }"; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 DATAFLEX_REVISION=$revision
# JAX and PyTorch take turns on the card, and a part's first process has to leave it to the next.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
scratch=$(mktemp -d) running=
# `timeout` has a process group of its own, which neither Ctrl-C nor a signal to this script reaches.
trap '[ -z "$running" ] || kill "$running" 2>/dev/null; rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
mkdir -p "$output/gpu-logs"

"$python" scripts/bench/gpu_setup.py "$scratch" || exit 2
card=$(cat "$scratch/card") code=$(cat "$scratch/code") peer=$(cat "$scratch/peer")
if [ "$card" = cpu ] && [ -z "$small" ]; then
    echo "error: no GPU here${JAX_PLATFORMS:+ for JAX_PLATFORMS=$JAX_PLATFORMS};" \
        "--small shows on a CPU that all parts run" >&2
    exit 2
fi
done_file=$output/gpu-$card.txt
touch "$done_file"
failed= later=

# NAME LEAST MOST COMMAND...: not begun where fewer than LEAST seconds are left, ended after MOST. The command is given
# --output=FILE, and in place of an empty --seconds= the time in which it should be done by itself.
part() {
    local name=$1 least=$2 most=$3 result=$output/$1-$card.json log=$output/gpu-logs/$1.log started=$SECONDS
    local left limit itself ended
    shift 3
    [[ ,$only, == *,$name,* ]] || return 0
    if [ -s "$result" ] && grep -qx "$name $code" "$done_file"; then
        echo "$name: there already, $result"
        return 0
    fi
    left=$(evaluated "60 * $minutes - $SECONDS") most=$(evaluated "$most * $patience")
    if [ "$(evaluated "$left < $least * $patience")" = 1 ]; then
        echo "$name: too little time is left"
        later="$later $name"
        return 0
    fi
    limit=$(evaluated "$most < $left ? $most : $left")
    itself=$(evaluated "0.85 * $limit")
    echo "$name: up to $limit s ..."
    timeout --kill-after=10 "$limit" "${@/%--seconds=/--seconds=$itself}" --output="$result" >"$log" 2>&1 &
    running=$!
    wait "$running"
    ended=$?
    running=
    if [ "$ended" = 0 ]; then
        sed -i "/^$name /d" "$done_file"
        echo "$name $code" >>"$done_file"
        echo "$name: done in $((SECONDS - started)) s"
    else
        echo "$name: failed ($ended) after $((SECONDS - started)) s, see $log; its end:"
        tail -n 5 "$log"
        failed="$failed $name"
    fi
}

if [ "$peer" = no ]; then
    echo "without PyTorch and PEFT: our train step alone, and no LESS, which is a comparison"
    only=${only/less/} compare=--nopeer
else
    compare="--peer_attention=cudnn,flash --peer_compile=false,true"
fi
# What a block starts anew is compiled once.
compiled="env JAX_COMPILATION_CACHE_DIR=$scratch/compilations"
if [ "$small" ]; then
    data="--config.data.seq_len=32 --config.data.batch_size=8 --config.data.tokenizer=bytes --config.model.hidden_size=32
        --config.model.intermediate_size=64 --config.model.num_hidden_layers=2 --config.model.vocab_size=512"
    part tests 10 200 "$python" scripts/bench/gpu_tests.py --quick --seconds=
    part train_speed 10 400 $compiled "$python" scripts/bench/train_speed.py --shape=tiny --seq_len=16 --batch=2 \
        --remat=dots --scan_layers=false,true $compare --rounds=2 --block=1 --sweep_steps=1 --restart --seconds=
    part less 10 160 "$python" scripts/bench/less.py --peer_python="$python" --candidates=16 \
        --peer_candidates=4 --targets=2 --length=32 --proj_dim=32 --hidden_size=32 --rounds=1
    part per_example_gradients 10 160 "$python" scripts/bench/per_example_gradients.py --small
    part step 10 160 "$python" scripts/bench/step.py --config=configs/odm.py $data --rounds=2 --block=4 --loader_steps=3
    part resume 10 160 "$python" scripts/bench/resume.py --few=2 --many=4 --repeats=1
else
    # Qwen2.5-0.5B, whose steps ask more of the loader than those of a larger model.
    shape="--config.model.hidden_size=896 --config.model.intermediate_size=4864 --config.model.num_hidden_layers=24
        --config.model.num_attention_heads=14 --config.model.num_key_value_heads=2 --config.model.vocab_size=151936"
    [ "$peer" = no ] || compare="--peer_batch=4,2 $compare"  # without recomputing; 8 rows do not fit
    part tests 60 200 "$python" scripts/bench/gpu_tests.py --seconds=
    part train_speed 200 460 $compiled "$python" scripts/bench/train_speed.py --shape=qwen2.5-1.5b --seq_len=2048 \
        --batch=8 --remat=dots --scan_layers=false,true $compare --rounds=3 --block=10 --sweep_steps=3 --restart --seconds=
    part less 60 120 "$python" scripts/bench/less.py --peer_python="$python" --candidates=2048 \
        --peer_candidates=64 --hidden_size=1024 --length=1024
    part per_example_gradients 90 160 "$python" scripts/bench/per_example_gradients.py --dtype=bfloat16 --seq_len=2048
    part step 90 140 "$python" scripts/bench/step.py --config=configs/odm.py $shape --config.model.dtype=bfloat16 \
        --config.model.remat=dots --config.data.seq_len=2048 --config.data.batch_size=8 \
        --config.data.cache_dir="$scratch/cache" --rounds=3 --block=14 --loader_steps=50
    part resume 60 100 "$python" scripts/bench/resume.py --many=500 --repeats=2
fi

[ -z "$failed" ] || echo "failed:$failed"
[ -z "$later" ] || echo "not begun:$later; the same command goes on with them"
[ -z "$failed$later" ] || exit 1
echo "all parts are in $output"
