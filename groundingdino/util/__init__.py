"""For code written against IDEA-Research/GroundingDINO; see `inference`."""
