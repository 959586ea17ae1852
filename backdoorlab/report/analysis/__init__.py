"""Pictures of what models compute of test images, for `report --analysis`: one file each."""
