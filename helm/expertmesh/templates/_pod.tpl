{{/* Volumes of every Ray pod. Takes a dict: root, shmSize, efa. */}}
{{- define "expertmesh.volumes" -}}
{{- $values := .root.Values -}}
- name: cluster-secret
  secret:
    secretName: {{ include "expertmesh.secretName" .root }}
    defaultMode: 0440
{{- with $values.apiKeys.existingSecret }}
- name: api-keys
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with $values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with include "expertmesh.kvStoreSecretName" .root }}
- name: kv-store
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items: [{key: password, path: password}]
{{- end }}
- name: cache
  emptyDir:
    sizeLimit: {{ $values.storage.cacheSize }}
- name: ray
  emptyDir: {}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .shmSize }}
{{- if .efa }}
- name: hugepages
  emptyDir:
    medium: HugePages-2Mi
{{- end }}
{{- if $values.storage.fsx.enabled }}
- name: fsx
  persistentVolumeClaim:
    claimName: {{ include "expertmesh.fullname" .root }}-fsx
{{- end }}
{{- if $values.storage.s3.enabled }}
- name: s3
  persistentVolumeClaim:
    claimName: {{ include "expertmesh.fullname" .root }}-s3
{{- end }}
{{- range $index, $claim := $values.storage.existingClaims }}
- name: claim-{{ $index }}
  persistentVolumeClaim:
    claimName: {{ $claim.claimName }}
{{- end }}
{{- end -}}

{{- define "expertmesh.volumeMounts" -}}
{{- $values := .root.Values -}}
- name: cluster-secret
  mountPath: /etc/expertmesh/secret
  readOnly: true
{{- if $values.apiKeys.existingSecret }}
- name: api-keys
  mountPath: /etc/expertmesh/api-keys
  readOnly: true
{{- end }}
{{- if $values.tls.existingSecret }}
- name: tls
  mountPath: /etc/expertmesh/tls
  readOnly: true
{{- end }}
{{- if include "expertmesh.kvStoreSecretName" .root }}
- name: kv-store
  mountPath: /etc/expertmesh/kv-store
  readOnly: true
{{- end }}
- name: cache
  mountPath: /var/cache/expertmesh
- name: ray
  mountPath: /tmp/ray
- name: shm
  mountPath: /dev/shm
{{- if .efa }}
- name: hugepages
  mountPath: /dev/hugepages
{{- end }}
{{- if $values.storage.fsx.enabled }}
- name: fsx
  mountPath: {{ $values.storage.fsx.mountPath }}
  readOnly: true
{{- end }}
{{- if $values.storage.s3.enabled }}
- name: s3
  mountPath: {{ $values.storage.s3.mountPath }}
  readOnly: true
{{- end }}
{{- range $index, $claim := $values.storage.existingClaims }}
- name: claim-{{ $index }}
  mountPath: {{ $claim.mountPath }}
  readOnly: {{ dig "readOnly" true $claim }}
{{- end }}
{{- end -}}

{{/* Template of the head pod. */}}
{{- define "expertmesh.headPod" -}}
{{- $head := .Values.head -}}
{{- $parts := dict "root" . "shmSize" "2Gi" "efa" 0 -}}
metadata:
  labels:
    {{- include "expertmesh.podLabels" . | nindent 4 }}
    expertmesh.io/group: head
  {{- with $head.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "expertmesh.serviceAccountName" . }}
  {{- with include "expertmesh.pullSecrets" . }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .Values.podSecurityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $head.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $head.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $head.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $head.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-head
      image: {{ include "expertmesh.image" (dict "root" . "accelerator" "cpu" "image" "") }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
        - {name: as-metrics, containerPort: 44217}
        - {name: dash-metrics, containerPort: 44227}
      env:
        - {name: EXPERTMESH_CACHE, value: /var/cache/expertmesh}
        {{- with $head.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml $head.resources | nindent 8 }}
      {{- with .Values.containerSecurityContext }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "expertmesh.volumeMounts" $parts | nindent 8 }}
  volumes:
    {{- include "expertmesh.volumes" $parts | nindent 4 }}
{{- end -}}

{{/* Tolerations of a group: those of its hardware, and its own. */}}
{{- define "expertmesh.tolerations" -}}
{{- if gt (int .gpus) 0 }}
- {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
{{- end }}
{{- if gt (int .neuronCores) 0 }}
- {key: aws.amazon.com/neuron, operator: Exists, effect: NoSchedule}
{{- end }}
{{- if gt (int .efa) 0 }}
- {key: vpc.amazonaws.com/efa, operator: Exists, effect: NoSchedule}
{{- end }}
{{- with .tolerations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Extended resources of a group's pods, which Kubernetes wants as limits. */}}
{{- define "expertmesh.devices" -}}
{{- if gt (int .gpus) 0 -}}
nvidia.com/gpu: {{ .gpus }}
{{- end }}
{{- if gt (int .neuronCores) 0 }}
aws.amazon.com/neuroncore: {{ .neuronCores }}
{{- end }}
{{- if gt (int .efa) 0 }}
vpc.amazonaws.com/efa: {{ .efa }}
hugepages-2Mi: {{ .hugepages2Mi }}
{{- end }}
{{- end -}}

{{/* Template of a worker pod. Takes a dict: root, name, group. */}}
{{- define "expertmesh.workerPod" -}}
{{- $root := .root -}}
{{- $group := .group -}}
{{- $efa := int $group.efa -}}
{{- $parts := dict "root" $root "shmSize" $group.shmSize "efa" $efa -}}
{{- $hyperpod := $root.Values.hyperpod -}}
{{- $annotations := deepCopy $group.annotations -}}
{{- $selector := deepCopy $group.nodeSelector -}}
{{- if $hyperpod.enabled -}}
{{- $_ := set $selector "sagemaker.amazonaws.com/node-health-status" "Schedulable" -}}
{{- if $hyperpod.autoResume }}{{ $_ := set $annotations "sagemaker.amazonaws.com/enable-job-auto-resume" "true" }}{{ end -}}
{{- end -}}
{{- $security := deepCopy $root.Values.containerSecurityContext -}}
{{- if $efa -}}
{{- $capabilities := default dict $security.capabilities -}}
{{- $_ := set $capabilities "add" (append (default list $capabilities.add) "IPC_LOCK" | uniq) -}}
{{- $_ := set $security "capabilities" $capabilities -}}
{{- end -}}
metadata:
  labels:
    {{- include "expertmesh.podLabels" $root | nindent 4 }}
    expertmesh.io/group: {{ .name }}
    expertmesh.io/side: {{ $group.side }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "expertmesh.serviceAccountName" $root }}
  terminationGracePeriodSeconds: {{ $group.terminationGracePeriodSeconds }}
  {{- with include "expertmesh.pullSecrets" $root }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $root.Values.podSecurityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $selector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "expertmesh.tolerations" $group | trim }}
  tolerations:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-worker
      image: {{ include "expertmesh.image" (dict "root" $root "accelerator" $group.accelerator "image" $group.image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      ports:
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
      env:
        - {name: EXPERTMESH_CACHE, value: /var/cache/expertmesh}
        {{- if $efa }}
        - {name: FI_PROVIDER, value: efa}
        - {name: FI_EFA_USE_DEVICE_RDMA, value: "1"}
        {{- end }}
        {{- with $group.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      lifecycle:
        preStop:
          exec:
            command: [/bin/sh, -c, ray stop]
      resources:
        requests:
          cpu: {{ $group.cpus | quote }}
          memory: {{ $group.memory }}
          {{- with include "expertmesh.devices" $group | trim }}
          {{- . | nindent 10 }}
          {{- end }}
        limits:
          memory: {{ $group.memory }}
          {{- with include "expertmesh.devices" $group | trim }}
          {{- . | nindent 10 }}
          {{- end }}
      {{- with $security }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "expertmesh.volumeMounts" $parts | nindent 8 }}
  volumes:
    {{- include "expertmesh.volumes" $parts | nindent 4 }}
{{- end -}}
