"""Workers that execute the parts of a plan: processes of this machine, actors of Ray, or the tasks of a job that is written.

`driver` deals the parts out and counts what comes back; `local` and `on_ray` start workers and carry messages; `written` makes
the files of a Slurm job array and a Kubernetes job, whose tasks are `adapterkit run PLAN --task I --tasks N`. No engine knows
how a part is executed, and no byte depends on the engine.
"""
