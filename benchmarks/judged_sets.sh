#!/bin/sh
# The judge's full table of one set of each kind: every row, every score, a second family of networks.
#
#   benchmarks/judged_sets.sh RUNS CIFAR10.npz TEACHERS TUDIR
#
# RUNS holds runs of `ddengine distill`, whose commands docs/log.md gives, under the names below; those of digits
# and MUTAG are made here. Each table is left in its run and, as JSON, in benchmarks/results/judged/; the summary
# in Markdown is benchmarks/results/judged_sets.md. A row that depends on data and recipe alone is computed once
# for all sets of one dataset and recipe. A table that is there already is left.
set -eu
runs=$1 npz=$2 teachers=$3 tu=$4
results=$(dirname "$0")/results
mkdir -p "$results/judged"

judge() { # NAME, then keys of `ddengine evaluate`
  name=$1
  shift
  [ -s "$results/judged/$name.json" ] && return
  ddengine evaluate "$runs/$name" "$@" --json > "$results/judged/$name.part"
  mv "$results/judged/$name.part" "$results/judged/$name.json"
}

rows=random,random_bytes,herding,kmeans,full,distilled_plain,random_plain
[ -d "$runs/digits_attention_ipc1/distilled" ] ||
  ddengine distill dataset=digits ipc=1 network.width=32 matcher=attention matcher.steps=300 matcher.lr=0.5 \
    matcher.schedule=cosine matcher.real_per_class=64 out="$runs/digits_attention_ipc1"
judge digits_attention_ipc1 networks='[convnet,mlp]' network.width=32 recipe.steps=200 \
  rows="[$rows,full_converged]" robust='[gaussian_noise,gaussian_blur,contrast,brightness,pixelate,pgd]'
for matcher in attention trajectory; do
  judge "fashion_${matcher}_ipc1" networks='[convnet,mlp]' network.width=16 recipe.steps=300 \
    recipe.lrs='[0.01,0.03]' rows="[$rows]"
done
[ -d "$runs/mutag_trees/distilled" ] ||
  ddengine distill dataset=tu dataset.name=MUTAG dataset.root="$tu" matcher=computation_tree matcher.select=evidence \
    matcher.degree=true budget.nbytes=1500 out="$runs/mutag_trees"
judge mutag_trees networks='[gin,gcn,gat]'
for set in compensated crops; do
  judge "cifar10_${set}_ipc10" dataset.root="$npz" experts="$teachers" recipe.steps=400 recipe.lrs='[0.002]' \
    rows="[random,random_bytes,random_same_labels,distilled_hard,herding,kmeans,full,distilled_plain,random_plain]"
done
ddengine report "$runs"/*_ipc* "$runs"/mutag_trees > "$results/judged_sets.md"
