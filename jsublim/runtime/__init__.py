"""The machine below: devices and layouts, processes of a pod, compiled programs."""
