#!/usr/bin/env bash
# Train CIFAR-10 in pieces, each short enough for a machine that is lent by the minute:
#
#     bench/gpu/cifar10.sh [--minutes 8.5] [--steps N] [--tiny] DATA OUT [options of simclr pretrain]
#
# DATA        CIFAR-10 as pictures: a folder with train/ and test/, one folder for each class below them, or an archive
#             of such a folder (.tgz), as https://s3.amazonaws.com/fast-ai-imageclas/cifar10.tgz
# OUT         the folder of the run; give the same one again to go on
# --minutes   when a piece ends: the step is finished, and a checkpoint written
# --steps     end a piece after about so many steps, if that comes first
# --tiny      a small network, two epochs, small batches: for a test on a CPU
#
# The paper's recipe for CIFAR-10 (appendix B.9) with a smaller network, batch and length: ResNet-18 with the stem for
# small images, 200 epochs, batch 512, learning rate 1.0 x 512/256, temperature 0.5; bfloat16 on a GPU. The last call
# evaluates: nearest neighbors, and a linear classifier trained for 100 epochs.
#
# Exit code 75: this piece is done, and the same command goes on. 0: all is done. Packages: those of the part `cifar`
# in run.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

usage() { sed -n '2,21s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
refuse() { echo "cifar10.sh: $1" >&2; exit 2; }

minutes=8.5 steps=0 tiny=
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=${2:?--minutes takes a number}; shift 2 ;;
        --steps) steps=${2:?--steps takes a number}; shift 2 ;;
        --tiny) tiny=yes; shift ;;
        -h|--help) usage; exit 0 ;;
        -*) refuse "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
[ $# -ge 2 ] || refuse 'it takes DATA and OUT: cifar10.sh DATA OUT; see --help'
data=$1 out=$2
shift 2
began=$SECONDS

[ -e "$data" ] || refuse "there is no $data. DATA is a folder of pictures with train/ and test/ below it, or a .tgz of one"
mkdir -p "$out"
if [ -f "$data" ]; then
    if [ ! -e "$out/images/unpacked" ]; then
        rm -rf "$out/images" && mkdir "$out/images"
        tar -xzf "$data" -C "$out/images" || refuse "$data is no archive that tar can read"
        touch "$out/images/unpacked"
    fi
    archive=$data
    for data in "$out/images" "$out/images"/*; do [ ! -d "$data/train" ] || break; done
    [ -d "$data/train" ] || refuse "$archive holds no train/"
fi
[ -d "$data/train" ] && [ -d "$data/test" ] || refuse "$data has no train/ and test/ below it"
run=$out/run

if [ -n "$tiny" ]; then
    recipe=(--arch resnet18_0.125x --size 32 --augment cifar10 --epochs 2 --batch-size 8 --lr 0.1 --temperature 0.5
            --num-workers 0 --knn-every 0 --measure-every 0 --save-every 1)
    protocol=(--protocol knn,linear --seeds 0 --baselines untrained --rates 0.1 --linear-epochs 1 --num-workers 0)
else
    precision=$("$python" -c 'import torch; print("bf16" if torch.cuda.is_available() else "fp32")')
    recipe=(--arch resnet18 --size 32 --augment cifar10 --epochs 200 --batch-size 512 --lr 2.0 --temperature 0.5
            --precision "$precision" --save-every 500)
    protocol=(--protocol knn,linear --seeds 0 --baselines untrained --linear-epochs 100)
fi

code=0
"$python" "$here/until.py" --minutes "$minutes" --steps "$steps" --checkpoints "$run/checkpoints" -- \
    "$python" -m simclr_nb pretrain "$data" --out "$run" "${recipe[@]}" "$@" || code=$?
if [ "$code" -eq 75 ]; then echo 'not done yet: the same command goes on'; fi
[ "$code" -eq 0 ] || exit "$code"

if [ -e "$run/report.md" ]; then echo "all is done: $run/report.md"; exit 0; fi
if ! "$python" -c 'import sys; sys.exit(float(sys.argv[1]) > 30*float(sys.argv[2]))' "$((SECONDS - began))" "$minutes"
then echo 'trained; the same command evaluates, which needs a call of its own'; exit 75; fi
"$python" -m simclr_nb evaluate "$run" "$data" "${protocol[@]}"
