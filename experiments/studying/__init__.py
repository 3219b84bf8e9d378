"""What a study is, how its runs are started, and what its numbers say.

`study` is the grid of runs, `standing` how far each of them is; `launch` starts one, `local` runs
a share of them here, `slurm` hands shares to a queue. `results` reads what runs left, `statistics`
and `sheets` make tables of it, `formats` writes these; `pictures` draws, `page` puts all on a page.
`experiments.sweep`, `experiments.table` and `experiments.report` are the ways in.
"""
