"""Write annotations in the layouts that this package reads, so that reading them again gives the same images and boxes.

Each writer takes splits, ``name -> Annotations``, and makes a new folder that is complete when it is visible. What a layout
cannot hold is said in the result, and refused where it would change what a box means:

============  =====  =======================  ===================  ===============
              COCO   VOC                      YOLO                 CSV
============  =====  =======================  ===================  ===============
image ids     yes    in ``<detpipe>``         no                   yes
class order   by id  in ``detpipe.json``      yes                  detpipe.json
category ids  yes    in ``detpipe.json``      in ``data.yaml``     detpipe.json
crowd         yes    in ``<detpipe>``         refused or dropped   yes
difficult     yes    yes                      refused or dropped   yes
area          yes    in ``<detpipe>``         no, that of the box  yes
segmentation  yes    in a file beside it      in a file beside it  beside it
============  =====  =======================  ===================  ===============
"""

from detpipe.datasets.formats.coco import write_coco
from detpipe.datasets.formats.export import Images, Written
from detpipe.datasets.formats.writers.csv_writer import write_csv
from detpipe.datasets.formats.writers.voc_writer import write_voc
from detpipe.datasets.formats.writers.yolo_writer import Flags, write_yolo

__all__ = ["Flags", "Images", "Written", "write_coco", "write_csv", "write_voc", "write_yolo"]
