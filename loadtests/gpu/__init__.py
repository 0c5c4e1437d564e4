"""`python -m loadtests gpu`: what a machine with a GPU proves of this project, or breaks.

`command` starts one process for each section (`python -m loadtests.gpu`); each writes what it
finds, line by line, where `page` reads it.
"""
