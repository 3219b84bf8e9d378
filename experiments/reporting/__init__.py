"""The parts of the report page: reading runs, drawing pictures, writing HTML.

`runs` reads workdirs, `quantities` names and formats what they hold, `ink` is the look of every
picture, `curves` and `maps` draw, `page` puts it together. `experiments.report` is the way in.
"""
