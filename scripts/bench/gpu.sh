#!/usr/bin/env bash
# All that one GPU has to show, in parts, under 20 minutes: the tests that need one, and the benchmarks beside PyTorch.
#
#   scripts/bench/gpu.sh [--small] [--only=tests,step] [--output=DIR] [--python=PYTHON] [--patience=1]
#
# Each part has a time limit and writes its JSON into DIR (docs/benchmarks) under the card's name. A part that is there
# for this very code is not run again, so that what a lease cut off goes on with the next; one that fails is named at
# the end, and its log is in DIR/gpu-logs. --small has tiny sizes, also on a CPU: it shows that all parts run. The time
# limits are multiplied by --patience.
#
# Nothing is fetched and nothing need be installed but the packages: the clone is imported as it lies. What PYTHON
# (python3) lacks of them is named at the start, with the command that downloads the wheels elsewhere. The peer's pass of
# LESS is transcribed to PyTorch, for DataFlex's own environment is one of a CPU.
set -uo pipefail
cd "$(dirname "$0")/../.."

small= only=tests,train_speed,per_example_gradients,less,step,resume output=docs/benchmarks python=python3 patience=1
for argument in "$@"; do
    case $argument in
        --small) small=--small ;;
        --only=*) only=${argument#*=} ;;
        --output=*) output=${argument#*=} ;;
        --python=*) python=${argument#*=} ;;
        --patience=*) patience=${argument#*=} ;;
        *) echo "error: $argument: accepted are --small, --only=, --output=, --python=, --patience=" >&2; exit 2 ;;
    esac
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$output/gpu-logs"

"$python" scripts/bench/gpu_setup.py "$scratch" || exit 2
card=$(cat "$scratch/card") code=$(cat "$scratch/code")
[ "$card" = cpu ] && [ -z "$small" ] && { echo "error: no GPU here; --small shows on a CPU that all parts run" >&2; exit 2; }
done_file=$output/gpu-$card.txt
touch "$done_file"
failed=

part() {  # NAME SECONDS COMMAND...: the command is given --output=FILE
    local name=$1 limit result=$output/$1-$card.json log=$output/gpu-logs/$1.log started=$SECONDS
    limit=$(awk "BEGIN { print $2 * $patience }")
    shift 2
    [[ ,$only, == *,$name,* ]] || return 0
    if [ -s "$result" ] && grep -qx "$name $code" "$done_file"; then
        echo "$name: there already, $result"
        return 0
    fi
    echo "$name: up to $limit s ..."
    if timeout --kill-after=10 "$limit" "$@" --output="$result" >"$log" 2>&1; then
        sed -i "/^$name /d" "$done_file"
        echo "$name $code" >>"$done_file"
        echo "$name: done in $((SECONDS - started)) s"
    else
        echo "$name: failed ($?) after $((SECONDS - started)) s, see $log; its end:"
        tail -n 5 "$log"
        failed="$failed $name"
    fi
}

if [ "$small" ]; then
    data="--config.data.seq_len=32 --config.data.batch_size=8 --config.data.tokenizer=bytes --config.model.hidden_size=32
        --config.model.intermediate_size=64 --config.model.num_hidden_layers=2"
    part tests 200 "$python" scripts/bench/gpu_tests.py --quick
    part train_speed 400 "$python" scripts/bench/train_speed.py --shape=tiny --seq_len=16 --batch=2 --remat=none,dots \
        --peer_attention=cudnn,flash --peer_compile=false,true --rounds=2 --block=1 --sweep_steps=1
    part per_example_gradients 160 "$python" scripts/bench/per_example_gradients.py --small
    part less 160 "$python" scripts/bench/less.py --peer_python="$python" --candidates=16 \
        --peer_candidates=4 --targets=2 --length=32 --proj_dim=32 --hidden_size=32 --rounds=1
    part step 160 "$python" scripts/bench/step.py --config=configs/odm.py $data --rounds=2 --block=4 --loader_steps=3
    part resume 160 "$python" scripts/bench/resume.py --few=2 --many=4 --repeats=1
else
    shape="--config.model.hidden_size=1536 --config.model.intermediate_size=8960 --config.model.num_hidden_layers=28
        --config.model.num_attention_heads=12 --config.model.num_key_value_heads=2 --config.model.vocab_size=151936"
    part tests 200 "$python" scripts/bench/gpu_tests.py
    part train_speed 460 "$python" scripts/bench/train_speed.py --shape=qwen2.5-1.5b --seq_len=2048 --batch=8 \
        --remat=dots,none --peer_attention=cudnn,flash --peer_compile=false,true --rounds=3 --block=4 --sweep_steps=3 \
        --restart
    part per_example_gradients 160 "$python" scripts/bench/per_example_gradients.py --dtype=bfloat16 --seq_len=2048
    part less 120 "$python" scripts/bench/less.py --peer_python="$python" --candidates=2048 \
        --peer_candidates=64 --hidden_size=1024 --length=1024
    part step 140 "$python" scripts/bench/step.py --config=configs/odm.py $shape --config.model.dtype=bfloat16 \
        --config.model.remat=dots --config.data.seq_len=2048 --config.data.batch_size=8 \
        --config.data.cache_dir="$scratch/cache" --rounds=3 --block=14 --loader_steps=50
    part resume 100 "$python" scripts/bench/resume.py --many=500 --repeats=3
fi

[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
echo "all parts are in $output"
