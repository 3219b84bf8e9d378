"""The parts of the report page: reading runs, drawing pictures, writing HTML.

`runs` reads workdirs, `quantities` names and formats their metrics, `style` defines the look of
every picture, `curves` and `heat_maps` draw, `page` builds the page. The entry point is
`experiments.report`.
"""
