{{/* The whole name: of the release, and of the chart where the release is called otherwise. */}}
{{- define "virt-fleece.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select the pods of a part: (dict "root" $ "component" "agent"). Fixed for the life of a release. */}}
{{- define "virt-fleece.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of an object; "component" may be left out. */}}
{{- define "virt-fleece.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: virt-fleece
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Metadata of an object below `metadata:`: (dict "root" $ "name" "..." "component" "..." "cluster" true "annotations" (dict)). */}}
{{- define "virt-fleece.metadata" -}}
name: {{ .name }}
{{- if not .cluster }}
namespace: {{ .root.Release.Namespace }}
{{- end }}
labels:
  {{- include "virt-fleece.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (default (dict) .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "virt-fleece.image" -}}
{{- with .Values.image -}}
{{- if .registry }}{{ .registry }}/{{ end }}{{ .repository }}
{{- if .digest }}@{{ .digest }}{{ else }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end -}}
{{- end -}}

{{- define "virt-fleece.controllerAccount" -}}
{{- $default := ternary (printf "%s-controller" (include "virt-fleece.fullname" .)) "default" .Values.controller.serviceAccount.create -}}
{{- default $default .Values.controller.serviceAccount.name -}}
{{- end -}}

{{- define "virt-fleece.agentAccount" -}}
{{- $default := ternary (printf "%s-agent" (include "virt-fleece.fullname" .)) "default" .Values.agent.serviceAccount.create -}}
{{- default $default .Values.agent.serviceAccount.name -}}
{{- end -}}

{{/* The accounts have to differ: the admission policies tell them apart by their names. */}}
{{- define "virt-fleece.checkAccounts" -}}
{{- if eq (include "virt-fleece.controllerAccount" .) (include "virt-fleece.agentAccount" .) -}}
{{- fail "controller.serviceAccount and agent.serviceAccount are the same account: name one for each, since the rights of an agent end at its node" -}}
{{- end -}}
{{- end -}}

{{/* User names of the two, as the API server sees them. */}}
{{- define "virt-fleece.controllerUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "virt-fleece.controllerAccount" . }}
{{- end -}}
{{- define "virt-fleece.agentUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "virt-fleece.agentAccount" . }}
{{- end -}}
