#!/bin/sh
# The benchmarks of each hot path on a CPU, with settings that together take less than 15 minutes on two cores.
#
#   benchmarks/cpu.sh OUT [TUDIR]
#
# OUT is a folder for the results and all that is made on the way; TUDIR holds the folders MUTAG and NCI1 of the TU
# collection: without it what needs them is left out, which is said. The published results are of longer runs. Run
# nothing else beside it.
set -eu
out=$1 tu=${2-}
here=$(dirname "$0")
mkdir -p "$out"
export OMP_NUM_THREADS=1 RESULTS="$out"
: > "$out/seconds.txt"

timed() { # NAME, then the words of the script
  began=$(date +%s)
  python "$here/$@" > "$out/$(basename "$1" .py).log" 2>&1 || { echo "$1 failed: see $out"; exit 1; }
  echo "$(($(date +%s) - began)) s  $*" | tee -a "$out/seconds.txt"
}
timed attention_step.py --repeat 2
timed expert_recording.py --repeat 1
timed judge_speed.py --repeat 1
timed trajectory_turns.py --steps 10 --rounds 3
timed trajectory_gradients.py --widths 32 --steps 10 20 --repeat 1
timed buffer_latency.py --repeat 10
timed recover_step.py --repeat 1 --steps 30 --save
timed compensated_bytes.py
timed image_tree.py "$out/tree" --classes 50
timed estimate.py "$out/estimate"
if [ -n "$tu" ]; then
  timed color_refinement.py --root "$tu" --repeat 3
  timed dag_epoch.py --root "$tu" --repeat 5
else
  echo "color_refinement.py and dag_epoch.py are left out: give TUDIR"
fi
