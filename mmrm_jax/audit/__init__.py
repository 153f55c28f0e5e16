"""How far preference data can be solved without its images: `mmrm audit`."""
