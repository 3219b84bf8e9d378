"""The parts of the report page: reading runs, drawing pictures, writing HTML.

`runs` reads workdirs, `quantities` names and formats their metrics, `ink` defines the look of every
picture, `curves` and `maps` draw, `page` builds the page. The entry point is `experiments.report`.
"""
