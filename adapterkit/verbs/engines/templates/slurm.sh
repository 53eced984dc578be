#!/bin/bash
#SBATCH --job-name={{name}}
#SBATCH --array=0-{{last}}
#SBATCH --cpus-per-task={{jobs}}
#SBATCH --mem={{memory}}M
{{gpu}}
#SBATCH --time={{time=24:00:00}}
#SBATCH --chdir={{folder}}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={{log}}

# One task of the array executes its share of the parts of a plan, on a node that sees the plan, its inputs and the output.
# The task that ends last makes the output. A task that runs again, on another node too, goes on where it was.
export OMP_NUM_THREADS=1
exec {{command}} --task "$SLURM_ARRAY_TASK_ID"
