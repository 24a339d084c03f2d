"""Where weights live while a model runs. Needs torch alone; the models never know."""
