"""Model families: what differs between SDXL, SD1.5 and SD3, a file each."""
