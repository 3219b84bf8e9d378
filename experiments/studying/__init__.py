"""Studies: their definition, the execution of their runs, and the analysis of the results.

`study` is the grid of runs, `status` reads how far each is; `launch` builds the command of a run,
`local` executes a share of the runs on this machine, `slurm` submits shares to a queue. `results`
reads the runs, `statistics` and `sheets` make tables, `formats` writes them; `pictures` draws,
`page` builds the page. `experiments.sweep`, `experiments.table` and `experiments.report` are the
entry points.
"""
