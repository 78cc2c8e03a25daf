"""CPU engines: programs that execute GPU languages on a CPU, watching addresses and schedules."""
