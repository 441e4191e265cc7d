"""Reports: a finished search in numbers, figures and one page."""
