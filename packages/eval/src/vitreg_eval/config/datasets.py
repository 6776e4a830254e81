"""Names of the labelled data sets, for help texts. Nothing here imports torch."""

DATASETS = {
    "imagenet-1k": "train/<wnid>/ and val/<wnid>/, or a flat val/ with LOC_val_solution.csv",
    "imagenette": "imagenette2, -320 or -160 with train/<wnid>/ and val/<wnid>/",
    "places205": "train_places205.csv, val_places205.csv and their images",
    "aircraft": "fgvc-aircraft-2013b: data/images, data/images_variant_{trainval,test}.txt",
    "cifar10": "cifar-10-batches-py or cifar-10-batches-bin",
    "cifar100": "cifar-100-python or cifar-100-binary; the 100 fine classes",
    "cub": "CUB_200_2011: images, images.txt, image_class_labels.txt, train_test_split.txt",
    "caltech101": "101_ObjectCategories; 30 images per class are trained on, the others reported on",
    "cars": "Stanford Cars: cars_train, cars_test, devkit, cars_test_annos_withlabels.mat",
    "dtd": "dtd: images, labels/{train1,val1,test1}.txt; trained on train1 and val1",
    "flowers102": "jpg, imagelabels.mat, setid.mat; trained on trnid and valid",
    "food101": "food-101: images, meta/{train,test}.txt",
    "pets": "Oxford-IIIT Pet: images, annotations/{trainval,test}.txt",
    "sun397": "SUN397 and Partitions/{Training_01,Testing_01,ClassName}.txt",
    "voc2007": "VOCdevkit/VOC2007; several classes per image; trainval and test",
}
"""Name -> official layout. Each may also be train/<class>/ and val/<class>/ or test/<class>/."""
HUB = "hub:"
"""What names of hub data sets start with: hub:ORG/NAME[:CONFIG][@TRAIN,VAL]."""
