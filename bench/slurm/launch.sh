# What the .sbatch files here have in common: start the ranks, pass signals on, requeue what is not finished.
# Sourced at their end, with the arguments of train.py; "binding" holds srun's options for the node's NUMA layout.
# HALNY_IMAGE=halny.sif before sbatch: train.py and all it needs come from that image (halny.def builds it).
#
# srun starts the ranks itself, one task each, without torchrun: a signal reaches each of them directly, Slurm binds and
# logs each, and nobody kills a rank 30 s into its last save. Where a rank dies, the others say which, and end.

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# As torchrun would: numpy's and torch's threads on the CPU would otherwise be as many as there are cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Where train.py keeps compiled kernels, if TRITON_CACHE_DIR does not say: on the node. A TMPDIR that came along from the
# shell of sbatch may be on a file system that all nodes share, where hundreds of ranks wait for each other.
export TMPDIR=${SLURM_TMPDIR:-/tmp}
# One connection would put gathering and reducing in turn; some sites set it for other programs.
unset CUDA_DEVICE_MAX_CONNECTIONS

logs=logs/$SLURM_JOB_ID  # a file a rank, continued after a requeue; rank 0's is the run's
mkdir -p "$logs"

# The newest checkpoint of the run folder that the start-up lines name, so that no flag of train.py is parsed here.
newest() {
    local folder
    folder=$(sed -n 's/^run      *\(.*\): a checkpoint every .*/\1/p' "$logs/0.txt" 2>/dev/null | tail -n 1)
    [[ -z $folder ]] || ls -d "$folder"/checkpoints/step-* 2>/dev/null | tail -n 1
}

program=(python -u train.py)
# Without a terminal, Apptainer hands signals on. APPTAINER_BIND names folders outside this one, of data for instance.
[[ -z ${HALNY_IMAGE:-} ]] || program=(apptainer run --nv --bind "$PWD" "$HALNY_IMAGE")

echo "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID: $SLURM_NTASKS ranks, the store on $MASTER_ADDR:$MASTER_PORT"
before=$(newest)

# --cpus-per-task: srun has not taken it from sbatch since Slurm 22.05.
# --wait: a minute after the first rank ended, whatever is left is ended; the ranks need seconds to agree on the reason.
srun --output="$logs/%t.txt" --open-mode=append --wait=60 --kill-on-bad-exit=0 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" "${binding[@]}" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
             export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
             exec "$@"' rank "${program[@]}" "$@" &
ranks=$!

# A signal to the whole job (preemption, scancel --full) reaches this shell too, which must outlive the ranks.
trap 'told=yes; kill -USR1 $ranks 2>/dev/null' USR1 TERM
told=yes
while [[ $told ]]; do  # "wait" returns when a signal comes in
    told=
    wait $ranks
    code=$?
done

# Exit codes are train.py's; of several, srun returns the highest.
if ((code == 0)); then
    echo "finished"
elif ((code == 2)); then
    echo "refused: see $logs/0.txt"
elif ((code == 75)) || [[ $(newest) != "$before" ]]; then
    # Stopped and saved; or failed, but further than the last time, so that trying again comes to an end.
    saved="ended with $code, saved $(basename "$(newest)")"
    # If Slurm is ending the job itself, that is left to it: a cancelled one would come back, and one that was requeued
    # comes back anyway. Only at its time limit a job would end for good.
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format "%T %r")  # a state and its reason
    if [[ $state =~ ^(COMPLETING|CANCELLED) && $state != *TimeLimit ]]; then
        echo "$saved; left to Slurm, which is ending the job"
    else
        echo "$saved; back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
else
    echo "failed with $code and came no further: see $logs"
fi
exit $code
