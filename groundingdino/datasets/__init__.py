"""For code written against IDEA-Research/GroundingDINO; see `transforms`. Data sets of ours are in `data`."""
