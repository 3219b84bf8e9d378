"""What a study is, how its runs are started, and what its numbers say.

`study` is the grid of runs, `standing` how far each of them is, `local` runs them here, `slurm`
hands them to a queue, `results` reads what they left, `statistics` and `sheets` make tables of it.
`experiments.sweep`, `experiments.table` and `experiments.report` are the ways in.
"""
