"""What shows that the ideas hold: experiments, annotators, benchmarks and figures. No idea imports anything of it."""
